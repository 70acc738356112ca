/*
 * A stand-in for bhyve(8), and under the name bhyvectl for bhyvectl(8): everything that vdskfs sees of them, in every
 * generation, written from what FreeBSD documents. It runs no guest; instead, threads write blocks to its disks and note
 * in its "memory" what was acknowledged. A restored one (-r) compares each block with its memory: they must be of one
 * instant.
 *
 *   bhyve [-r FILE] [-m BYTES] [-o rundir=DIR] [-s SLOT,virtio-blk,DISK]... [other options of bhyve] NAME
 *   bhyvectl --vm=NAME [--rundir=DIR] --checkpoint=FILE | --suspend=FILE | --force-poweroff | ...
 *
 * The environment says how it behaves:
 *   BHYVE_GENERATION  A, B, C, D (the default) or E, the dialects of the control socket; none: built without snapshots
 *   BHYVE_THREADS     writers of each disk, 2 by default; 0: a guest that only idles
 *   BHYVE_FAULT       a file with what is to go wrong at the next checkpoint, read anew each time; see `enum fault`
 *   BHYVE_COMPARE     with -r: end once the disks were compared, with status 0 if they fit
 *   BHYVE_DELAY_US    pause of a writer between two writes, 0 by default
 *   BHYVECTL_LOG      bhyvectl appends its arguments to this file, a line for each call
 *
 * bhyve prints one line for each thing that happens: ready, restored BLOCKS, inconsistent BLOCKS, saving, paused MS,
 * saved, failed REASON, and "empty connection", which no one may cause.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 256		/* on each disk, spread over all of it */
#define DISKS_MAX 4
#define MAGIC 0x6d656d2d65767968ull
#define KERN_STRUCTS 3
#define DEVICES_MAX (DISKS_MAX + 1)

/* What the guest remembers; the start of its memory. The rest of the memory is noise. */
struct memory {
	uint64_t magic;
	uint64_t disks;
	/* Number of the last write to each block that was acknowledged. 0: none yet, the block reads as zeros. */
	uint64_t acknowledged[DISKS_MAX][BLOCKS];
	uint64_t last;
};

static struct memory *memory;
static size_t memory_bytes = 8 << 20;
static const char *name, *rundir = "/var/run/bhyve", *restore;
static char generation = 'D';
static struct { const char *path; int fd; off_t stride; } disks[DISKS_MAX];
static int disk_count;

/* Held for reading from before a write until its acknowledgement is in memory; for writing by whoever stops them. */
static pthread_rwlock_t running;
static atomic_ulong writes;

/* What goes wrong at the next checkpoint. */
enum fault { FINE, DIE, HANG, UNSAVABLE, NONSENSE, SHORT, REFUSE, UNPAUSED };
static enum fault fault;
static int fault_step;		/* of DIE and HANG: the step of the checkpoint, as numbered below */

static void say(const char *format, ...)
{
	va_list list;
	va_start(list, format);
	char line[512];
	int bytes = vsnprintf(line, sizeof line - 1, format, list);
	va_end(list);
	line[bytes] = '\n';
	if (write(STDOUT_FILENO, line, bytes + 1) < 0)
		_exit(1);
}

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(4);
}

static double now_ms(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static uint64_t noise(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* ---- the guest ---- */

static void fill_block(uint64_t *block, int index, uint64_t number)
{
	uint64_t state = number * 0x9e3779b97f4a7c15ull + index + 1;
	block[0] = number;
	block[1] = index;
	for (int at = 2; at < BLOCK / 8; at++)
		block[at] = number == 0 ? 0 : noise(&state);
	if (number == 0)
		block[1] = 0;
}

struct writer { int disk, thread, threads; };

static void *write_blocks(void *argument)
{
	struct writer *me = argument;
	static __thread uint64_t block[BLOCK / 8];
	const char *delay = getenv("BHYVE_DELAY_US");
	uint64_t state = 88172645463325252ull + me->disk * 1000 + me->thread + getpid();
	for (;;) {
		int index = noise(&state) % (BLOCKS / me->threads) * me->threads + me->thread;
		pthread_rwlock_rdlock(&running);
		uint64_t number = __atomic_add_fetch(&memory->last, 1, __ATOMIC_SEQ_CST);
		fill_block(block, index, number);
		if (pwrite(disks[me->disk].fd, block, BLOCK, index * disks[me->disk].stride) != BLOCK) {
			say("write error %s", strerror(errno));
			_exit(4);
		}
		memory->acknowledged[me->disk][index] = number;
		pthread_rwlock_unlock(&running);
		writes++;
		if (delay != NULL)
			usleep(atoi(delay));
	}
	return NULL;
}

/* Blocks that are not what the memory says. */
static int compare_disks(void)
{
	uint64_t expected[BLOCK / 8], found[BLOCK / 8];
	int wrong = 0;
	for (int disk = 0; disk < disk_count; disk++)
		for (int index = 0; index < BLOCKS; index++) {
			fill_block(expected, index, memory->acknowledged[disk][index]);
			if (pread(disks[disk].fd, found, BLOCK, index * disks[disk].stride) != BLOCK)
				die("read of a disk");
			wrong += memcmp(expected, found, BLOCK) != 0;
		}
	return wrong;
}

/* A guest that boots finds on its disks what an earlier one has left there. */
static void read_disks(void)
{
	uint64_t found[BLOCK / 8];
	for (int disk = 0; disk < disk_count; disk++)
		for (int index = 0; index < BLOCKS; index++) {
			if (pread(disks[disk].fd, found, BLOCK, index * disks[disk].stride) != BLOCK)
				die("read of a disk");
			memory->acknowledged[disk][index] = found[0];
			if (found[0] > memory->last)
				memory->last = found[0];
		}
}

/* ---- saving ---- */

static void read_fault(void)
{
	static const char *names[] = { "fine", "die", "hang", "unsavable", "nonsense", "short", "refuse", "unpaused" };
	char word[32] = "fine";
	fault = FINE;
	fault_step = 0;
	const char *path = getenv("BHYVE_FAULT");
	FILE *file = path == NULL ? NULL : fopen(path, "r");
	if (file == NULL)
		return;
	if (fscanf(file, "%31s %d", word, &fault_step) < 1)
		strcpy(word, "fine");
	fclose(file);
	for (size_t at = 0; at < sizeof names / sizeof *names; at++)
		if (strcmp(word, names[at]) == 0)
			fault = at;
}

static void step(int number)
{
	if (number != fault_step)
		return;
	if (fault == DIE)
		kill(getpid(), SIGKILL);
	while (fault == HANG)
		pause();
}

static int write_all(int fd, const void *data, size_t bytes)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t written = write(fd, (const char *)data + done, bytes - done);
		if (written < 0)
			return errno;
		done += written;
	}
	return 0;
}

/* Of the noise; only the first of it, since the guest stands still meanwhile. */
static uint64_t checksum(void)
{
	const uint64_t *words = (const uint64_t *)(memory + 1);
	size_t bytes = memory_bytes - sizeof *memory;
	uint64_t sum = 14695981039346656037ull;
	for (size_t at = 0; at < (bytes < 4 << 20 ? bytes : 4 << 20) / 8; at++)
		sum = (sum ^ words[at]) * 1099511628211ull;
	return sum;
}

static int create_file(int directory, const char *file, const char *ending, int flags)
{
	char path[256];
	if (snprintf(path, sizeof path, "%s%s", file, ending) >= (int)sizeof path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	return openat(directory, path, flags | O_CREAT | O_TRUNC | O_CLOEXEC, 0700);
}

static const char *structs[KERN_STRUCTS] = { "vhpet", "vm", "vlapic" };

/* Memory in one write for each region, as bhyve does without a terminal. */
static int save_memory(int file)
{
	if (fault == UNPAUSED) {
		/* The rest only after the guest has gone on for a while, which no guest that is paused could. */
		int error = write_all(file, memory, BLOCK);
		if (error != 0)
			return error;
		for (unsigned long until = writes + 200; writes < until;)
			usleep(100);
		return write_all(file, (char *)memory + BLOCK, memory_bytes - BLOCK);
	}
	if (fault == DIE && fault_step == 6) {
		write_all(file, memory, memory_bytes / 2);
		fault_step = 0;
		kill(getpid(), SIGKILL);
	}
	return write_all(file, memory, fault == SHORT ? memory_bytes / 2 : memory_bytes);
}

/* Structures, then devices, one write each; what they are goes into the description. */
static int save_parts(int kern, FILE *meta)
{
	bool is_old = generation < 'D';
	char data[512];
	off_t offset = 0;
	fprintf(meta, "{\n  \"basic metadata\": {\n    \"ncpus\": 1,\n    \"vmname\": \"%s\",\n", name);
	fprintf(meta, "    \"memsize\": %zu,\n    \"memflags\": 0\n  },\n", memory_bytes);
	step(8);
	fprintf(meta, "  \"%s\": [", is_old ? "structs" : "kern_structs");
	for (int at = 0; at < KERN_STRUCTS; at++) {
		size_t bytes = 64 + at * 8;
		memset(data, at + 1, sizeof data);
		if (at == 1) {
			uint64_t sum = checksum();
			memcpy(data, &sum, sizeof sum);
		}
		if (write(kern, data, bytes) != (ssize_t)bytes)
			return errno ? errno : EIO;
		fprintf(meta, "%s\n    { \"%s\": \"%s\", ", at == 0 ? "" : ",", is_old ? "debug_name" : "device", structs[at]);
		if (is_old)
			fprintf(meta, "\"snapshot_req\": %d, ", at + 1);
		fprintf(meta, "\"size\": %zu, \"file_offset\": %lld }", bytes, (long long)offset);
		offset += bytes;
	}
	step(9);
	if (fault == UNSAVABLE)
		return ENOTSUP;
	fprintf(meta, "\n  ],\n  \"devices\": [");
	for (int at = 0; at <= disk_count; at++) {
		char device[64];
		size_t bytes = 128 + at * 4;
		if (at == disk_count)
			strcpy(device, "atkbdc");
		else
			snprintf(device, sizeof device, is_old ? "virtio-blk" : "virtio-blk@pci.0.%d.0", at + 3);
		memset(data, 0x80 + at, sizeof data);
		if (write(kern, data, bytes) != (ssize_t)bytes)
			return errno ? errno : EIO;
		fprintf(meta, "%s\n    { \"%s\": \"%s\", \"size\": %zu, \"file_offset\": %lld }", at == 0 ? "" : ",",
		    is_old ? "snapshot_req" : "device", device, bytes, (long long)offset);
		offset += bytes;
	}
	fprintf(meta, "\n  ]\n}\n");
	return 0;
}

/* A checkpoint in the order of vm_checkpoint(); the steps are those of bhyve. 0 or an errno. */
static int checkpoint(int directory, const char *file, bool suspend)
{
	read_fault();
	say("saving");
	if (fault == REFUSE)
		return EACCES;
	step(1);
	int kern = create_file(directory, file, ".kern", O_WRONLY);
	step(2);
	int state = kern < 0 ? -1 : create_file(directory, file, "", O_RDWR);
	step(3);
	int description = state < 0 ? -1 : create_file(directory, file, ".meta", O_WRONLY);
	FILE *meta = description < 0 ? NULL : fdopen(description, "w");
	if (meta == NULL) {
		int error = errno;
		close(kern);
		close(state);
		return error;
	}
	step(4);
	double begin = now_ms();
	if (fault != UNPAUSED)
		pthread_rwlock_wrlock(&running);
	step(5);
	for (int disk = 0; disk < disk_count; disk++)
		fsync(disks[disk].fd);
	step(6);
	int error = save_memory(state);
	step(7);
	if (error == 0 && fault == NONSENSE) {
		char garbage[] = "\x7f nothing of the kind";
		fwrite(garbage, 1, sizeof garbage, meta);
		error = write_all(kern, garbage, sizeof garbage);
	} else if (error == 0)
		error = save_parts(kern, meta);
	step(10);
	fflush(meta);
	step(11);
	if (suspend && error == 0) {
		say("suspended");
		_exit(0);
	}
	step(12);
	if (fault != UNPAUSED)
		pthread_rwlock_unlock(&running);
	say("paused %.3f", now_ms() - begin);
	step(13);
	close(state);
	fclose(meta);
	close(kern);
	return error;
}

/* ---- the control socket ---- */

static bool receive_all(int connection, void *data, size_t bytes)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t got = recv(connection, (char *)data + done, bytes - done, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		done += got;
	}
	return true;
}

struct list_header { uint8_t magic, version, flags; uint64_t descriptors, size; } __attribute__((packed));
struct pair_header { uint8_t type; uint16_t name_bytes; uint64_t data_bytes, items; } __attribute__((packed));

struct request {
	bool has_command, has_file, has_suspend, suspend;
	char command[32], file[1024];
	int directory;
};

/* nvlist_recv(): exact lengths, then one byte with the descriptor. */
static bool receive_list(int connection, struct request *request)
{
	struct list_header header;
	static uint8_t body[4096];
	memset(request, 0, sizeof *request);
	request->directory = -1;
	struct pollfd wait = { .fd = connection, .events = POLLIN };
	uint8_t byte;
	if (poll(&wait, 1, -1) == 1 && recv(connection, &byte, 1, MSG_PEEK) == 0)
		say("empty connection");
	if (!receive_all(connection, &header, sizeof header) || header.magic != 0x6c || header.flags != 0 ||
	    header.size > sizeof body || !receive_all(connection, body, header.size))
		return false;
	if (header.descriptors > 1)
		return false;
	if (header.descriptors == 1) {
		char control[CMSG_SPACE(sizeof(int))];
		struct iovec vector = { &byte, 1 };
		struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
		if (recvmsg(connection, &message, MSG_CMSG_CLOEXEC) != 1 || CMSG_FIRSTHDR(&message) == NULL)
			return false;
		memcpy(&request->directory, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	}
	for (size_t at = 0; at + sizeof(struct pair_header) <= header.size;) {
		struct pair_header *pair = (void *)(body + at);
		const char *key = (char *)(pair + 1);
		const uint8_t *data = (uint8_t *)key + pair->name_bytes;
		if (data + pair->data_bytes > body + header.size)
			return false;
		if (pair->type == 4 && strcmp(key, "cmd") == 0) {
			request->has_command = true;
			snprintf(request->command, sizeof request->command, "%s", data);
		} else if (pair->type == 4 && strcmp(key, "filename") == 0) {
			request->has_file = true;
			snprintf(request->file, sizeof request->file, "%s", data);
		} else if (pair->type == 2 && strcmp(key, "suspend") == 0) {
			request->has_suspend = true;
			request->suspend = data[0];
		}
		at = data + pair->data_bytes - body;
	}
	return true;
}

static size_t add_pair(uint8_t *at, uint8_t type, const char *key, const void *data, size_t bytes)
{
	struct pair_header pair = { type, strlen(key) + 1, bytes, 0 };
	memcpy(at, &pair, sizeof pair);
	memcpy(at + sizeof pair, key, pair.name_bytes);
	memcpy(at + sizeof pair + pair.name_bytes, data, bytes);
	return sizeof pair + pair.name_bytes + bytes;
}

/* A list with the pairs at `body`; without MSG_NOSIGNAL, as libnv sends. */
static void send_list(int connection, const uint8_t *body, size_t bytes, int descriptor)
{
	struct list_header header = { 0x6c, 0, 0, descriptor >= 0, bytes };
	send(connection, &header, sizeof header, 0);
	if (bytes > 0)
		send(connection, body, bytes, 0);
	if (descriptor < 0)
		return;
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	uint8_t byte = 0;
	struct iovec vector = { &byte, 1 };
	struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(rights), &descriptor, sizeof(int));
	sendmsg(connection, &message, 0);
}

static int serve_list(int connection)
{
	struct request request;
	if (!receive_list(connection, &request))
		return EINVAL;
	if (!request.has_command) {
		if (generation == 'E')
			abort();	/* the getter of a missing element ends the process, and the guest */
		return EINVAL;
	}
	int directory = AT_FDCWD;
	int error = 0;
	if (strcmp(request.command, "checkpoint") != 0)
		error = EOPNOTSUPP;
	else if (!request.has_file || !request.has_suspend)
		error = EINVAL;
	else if (generation >= 'D') {
		directory = request.directory;
		if (directory < 0)
			error = EINVAL;
		else if (strchr(request.file, '/') != NULL)
			error = EPERM;	/* capability mode; ENOTCAPABLE there */
	}
	if (error == 0)
		error = checkpoint(directory, request.file, request.suspend);
	if (request.directory >= 0)
		close(request.directory);
	if (generation == 'E') {
		uint8_t body[256];
		size_t bytes = error == 0 ? 0 : add_pair(body, 4, "error", strerror(error), strlen(strerror(error)) + 1);
		send_list(connection, body, bytes, -1);
	}
	return error;
}

static int serve_struct(const uint8_t *message)
{
	uint32_t operation;
	memcpy(&operation, message, sizeof operation);
	return checkpoint(AT_FDCWD, (const char *)message + sizeof operation, operation == 1);
}

static int bind_socket(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *folder = generation == 'A' ? "/checkpoint" : "";
	char path[sizeof address.sun_path];
	snprintf(path, sizeof path, "%s%s", rundir, folder);
	mkdir(path, 0755);
	if (snprintf(address.sun_path, sizeof address.sun_path, "%s%s/%s", rundir, folder, name) >= (int)sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		die("control socket");
	}
	int server = socket(AF_UNIX, (generation == 'B' ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
	unlink(address.sun_path);
	if (bind(server, (struct sockaddr *)&address, sizeof address) < 0 || (generation != 'B' && listen(server, 10) < 0))
		die(address.sun_path);
	return server;
}

static void *serve(void *argument)
{
	int server = (int)(intptr_t)argument;
	static uint8_t message[1028];
	for (;;) {
		int error = 0, connection = -1;
		if (generation == 'B') {
			if (recv(server, message, sizeof message, 0) < 4)
				continue;
			error = serve_struct(message);
		} else {
			connection = accept4(server, NULL, NULL, SOCK_CLOEXEC);
			if (connection < 0)
				die("accept");
			if (generation == 'A') {
				/* One buffer for all requests, and the end of a connection is not looked for. */
				size_t done = 0;
				ssize_t got;
				while (done < 104 && (got = recv(connection, message + done, 104 - done, 0)) > 0)
					done += got;
				if (done == 0)
					say("empty connection");
				error = serve_struct(message);
			} else
				error = serve_list(connection);
		}
		if (error == 0)
			say("saved");
		else
			say("failed %s", strerror(error));
		if (connection >= 0)
			close(connection);
	}
	return NULL;
}

/* ---- restoring ---- */

static void restore_state(void)
{
	char path[4096], text[8192];
	struct stat status;
	int file = open(restore, O_RDONLY);
	if (file < 0 || fstat(file, &status) < 0 || status.st_size == 0)
		die(restore);
	memory_bytes = status.st_size;
	snprintf(path, sizeof path, "%s.kern", restore);
	int kern = open(path, O_RDONLY);
	if (kern < 0 || fstat(kern, &status) < 0 || status.st_size == 0)
		die(path);
	uint8_t *parts = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED, kern, 0);
	if (parts == MAP_FAILED)
		die("mmap of the .kern file");
	snprintf(path, sizeof path, "%s.meta", restore);
	int meta = open(path, O_RDONLY);
	ssize_t bytes = meta < 0 ? -1 : read(meta, text, sizeof text - 1);
	if (bytes <= 0)
		die(path);
	text[bytes] = 0;
	const char *size = strstr(text, "\"memsize\":");
	if (size == NULL || strtoull(size + 10, NULL, 10) != memory_bytes) {
		fprintf(stderr, "mem size mismatch\n");
		exit(4);
	}
	memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t done = 0; done < memory_bytes;) {
		ssize_t got = read(file, (char *)memory + done, memory_bytes - done);
		if (got <= 0)
			die(restore);
		done += got;
	}
	uint64_t sum;
	memcpy(&sum, parts + 64, sizeof sum);	/* the second structure */
	if (memory->magic != MAGIC || memory->disks != (uint64_t)disk_count || sum != checksum()) {
		say("inconsistent memory");
		exit(4);
	}
	int wrong = compare_disks();
	if (wrong > 0) {
		say("inconsistent %d", wrong);
		exit(4);
	}
	munmap(parts, status.st_size);
	close(file);
	close(kern);
	close(meta);
	say("restored %d", disk_count * BLOCKS);
	if (getenv("BHYVE_COMPARE") != NULL)
		exit(0);
}

static void boot(void)
{
	memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("memory");
	uint64_t state = 1 + getpid();
	for (uint64_t *word = (uint64_t *)(memory + 1); word + 1 <= (uint64_t *)((char *)memory + memory_bytes); word++)
		*word = noise(&state);
	memory->magic = MAGIC;
	memory->disks = disk_count;
	read_disks();
}

/* ---- bhyvectl ---- */

static int usage(void)
{
	fprintf(stderr, "Usage: bhyvectl --vm=<vmname>\n       [--checkpoint=<filename>]\n");
	return 1;
}

static int connect_to(const char *path, int type)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	int client = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (connect(client, (struct sockaddr *)&address, sizeof address) == 0)
		return client;
	int error = errno;
	perror("connect() failed");
	exit(error);
}

static int control_main(int count, char **words)
{
	const char *log = getenv("BHYVECTL_LOG");
	FILE *file = log == NULL ? NULL : fopen(log, "a");
	if (file != NULL) {
		for (int at = 1; at < count; at++)
			fprintf(file, "%s%s", at > 1 ? " " : "", words[at]);
		fprintf(file, "\n");
		fclose(file);
	}
	const char *state = NULL;
	bool suspend = false;
	for (int at = 1; at < count; at++) {
		char *word = words[at];
		if (strncmp(word, "--vm=", 5) == 0)
			name = word + 5;
		else if (strncmp(word, "--rundir=", 9) == 0)
			rundir = word + 9;
		else if (strncmp(word, "--checkpoint=", 13) == 0)
			state = word + 13;
		else if (strncmp(word, "--suspend=", 10) == 0) {
			state = word + 10;
			suspend = true;
		} else if (strcmp(word, "--get-stats") == 0)
			printf("vcpu0 stats:\nvm exits\t\t42\n");
		else if (strcmp(word, "--force-poweroff") != 0 && strcmp(word, "--force-reset") != 0 &&
		    strcmp(word, "--inject-nmi") != 0 && strcmp(word, "--destroy") != 0) {
			fprintf(stderr, "bhyvectl: unrecognized option '%s'\n", word);
			return usage();
		}
	}
	if (name == NULL)
		return usage();
	if (state == NULL)
		return 0;
	char path[108];
	snprintf(path, sizeof path, "%s%s/%s", rundir, generation == 'A' ? "/checkpoint" : "", name);
	int client = connect_to(path, generation == 'B' ? SOCK_DGRAM : SOCK_STREAM);
	if (generation <= 'B') {
		uint8_t message[1028] = { suspend };
		snprintf((char *)message + 4, generation == 'A' ? 100 : 1024, "%s", state);
		send(client, message, generation == 'A' ? 104 : 1028, 0);
		return 0;
	}
	char copy[1024], copy2[1024];
	snprintf(copy, sizeof copy, "%s", state);
	snprintf(copy2, sizeof copy2, "%s", state);
	const char *file_name = generation == 'C' ? state : basename(copy);
	int directory = generation == 'C' ? -1 : open(dirname(copy2), O_RDONLY | O_DIRECTORY);
	if (generation != 'C' && directory < 0)
		return errno;
	uint8_t body[2048];
	uint8_t yes = suspend;
	int64_t index = 0;
	size_t bytes = add_pair(body, 4, "cmd", "checkpoint", 11);
	bytes += add_pair(body + bytes, 4, "filename", file_name, strlen(file_name) + 1);
	bytes += add_pair(body + bytes, 2, "suspend", &yes, 1);
	if (directory >= 0)
		bytes += add_pair(body + bytes, 6, "fddir", &index, 8);
	send_list(client, body, bytes, directory);
	if (generation == 'E') {
		struct list_header header;
		uint8_t answer[512];
		if (!receive_all(client, &header, sizeof header) || header.size > sizeof answer) {
			fprintf(stderr, "nvlist_recv() failed\n");
			return 1;
		}
		if (header.size > 0 && receive_all(client, answer, header.size)) {
			fprintf(stderr, "%s\n", (char *)answer + sizeof(struct pair_header) + sizeof "error");
			return 1;
		}
	}
	return 0;
}

/* ---- */

static void add_disk(char *device)
{
	char *path = strchr(device, ',');
	if (path == NULL || (strncmp(path, ",virtio-blk,", 12) != 0 && strncmp(path, ",ahci-hd,", 9) != 0))
		return;
	path = strchr(path + 1, ',') + 1;
	struct stat status;
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)	/* bhyve goes on with a read-only disk, without a word */
		fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status) < 0)
		die(path);
	disks[disk_count].path = path;
	disks[disk_count].fd = fd;
	disks[disk_count++].stride = status.st_size / BLOCKS / BLOCK * BLOCK;
}

/* setproctitle(): over the arguments, which no one can read any more. */
static void set_title(int count, char **words)
{
	char title[256];
	snprintf(title, sizeof title, "bhyve: %s", name);
	char *end = words[count - 1] + strlen(words[count - 1]) + 1;
	size_t room = end - words[0];
	memset(words[0], 0, room);
	memcpy(words[0], title, strlen(title) < room ? strlen(title) : room - 1);
}

int main(int count, char **words)
{
	const char *given = getenv("BHYVE_GENERATION");
	if (given != NULL)
		generation = given[0] == 'n' ? 0 : given[0];
	if (strcmp(basename(strdup(words[0])), "bhyvectl") == 0)
		return control_main(count, words);

	int option;
	while ((option = getopt(count, words, "+aehuwxACDHIPSWYk:f:o:p:G:c:s:m:l:K:U:r:")) != -1) {
		char *value = optarg == NULL ? NULL : strdup(optarg);
		if (option == 'r')
			restore = value;
		else if (option == 'm')
			memory_bytes = strtoull(value, NULL, 10);
		else if (option == 'o' && strncmp(value, "rundir=", 7) == 0)
			rundir = value + 7;
		else if (option == 's')
			add_disk(value);
		else if (option == '?')
			return 4;
	}
	if (optind + 1 != count) {
		fprintf(stderr, "usage: bhyve [options] vm-name\n");
		return 4;
	}
	name = strdup(words[optind]);
	if (restore != NULL)
		restore_state();
	else
		boot();
	set_title(count, words);

	/* A stopper goes before new writers, or a checkpoint would wait for ever. */
	pthread_rwlockattr_t attributes;
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&running, &attributes);
	pthread_t thread;
	if (generation != 0) {
		mkdir(rundir, 0755);
		pthread_create(&thread, NULL, serve, (void *)(intptr_t)bind_socket());
	}
	int threads = getenv("BHYVE_THREADS") == NULL ? 2 : atoi(getenv("BHYVE_THREADS"));
	for (int disk = 0; disk < disk_count; disk++)
		for (int at = 0; at < threads; at++) {
			struct writer *writer = malloc(sizeof *writer);
			*writer = (struct writer){ disk, at, threads };
			pthread_create(&thread, NULL, write_blocks, writer);
		}
	say("ready");
	for (;;)
		pause();
}
