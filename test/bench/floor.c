/*
 * The floor: the least that any user-space FUSE server must do. One file, one pread(2) or pwrite(2) on a raw file for
 * each request, on libfuse 3's low-level interface with its own threads. It knows no format.
 *
 *     floor RAWFILE START MOUNTPOINT        serves MOUNTPOINT/disk.raw until SIGTERM or umount(8)
 *
 * The disk begins at byte START of the file, as it does in a qcow2 file, behind the tables: the page cache of both then
 * has its large folios at the same places of the disk.
 *
 * So that only the work differs from vdskfs: requests up to 1 MiB, and files opened with the same two flags
 * (FOPEN_DIRECT_IO and FOPEN_PARALLEL_DIRECT_WRITES). No splicing: small requests lose by it.
 */
#define FUSE_USE_VERSION 31 /* clone_fd is an argument of fuse_session_loop_mt: fits every libfuse 3 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif

enum { FILE_INO = 2, MAX_BYTES = 1 << 20 };
static const char FILE_NAME[] = "disk.raw";
static const double VALID_SECONDS = 1000;

static int raw;
static off_t start;

static int attributes(fuse_ino_t ino, struct stat *st)
{
	memset(st, 0, sizeof *st);
	if (ino == FUSE_ROOT_ID) {
		st->st_mode = S_IFDIR | 0755;
		st->st_nlink = 2;
	} else {
		if (fstat(raw, st) < 0)
			return errno;
		st->st_size -= start;
		st->st_mode = S_IFREG | 0644;
		st->st_nlink = 1;
	}
	st->st_ino = ino;
	return 0;
}

static void init(void *data, struct fuse_conn_info *conn)
{
	(void)data;
	conn->max_write = MAX_BYTES;
	conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
}

static void lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .ino = FILE_INO, .attr_timeout = VALID_SECONDS, .entry_timeout = VALID_SECONDS };
	int error = parent == FUSE_ROOT_ID && strcmp(name, FILE_NAME) == 0 ? attributes(FILE_INO, &entry.attr) : ENOENT;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_entry(req, &entry);
}

static void getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct stat st;
	int error = attributes(ino, &st);
	(void)info;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_attr(req, &st, VALID_SECONDS);
}

static void open_file(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	/* Written out: libfuse before 3.15 cannot say FOPEN_PARALLEL_DIRECT_WRITES. */
	struct fuse_open_out out = { .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES };
	(void)info;
	if (ino != FILE_INO)
		fuse_reply_err(req, EISDIR);
	else
		fuse_reply_buf(req, (const char *)&out, sizeof out);
}

static void read_file(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *info)
{
	static _Thread_local char *buffer;
	ssize_t count;
	(void)ino, (void)info;
	if (!buffer && !(buffer = aligned_alloc(4096, MAX_BYTES))) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	count = pread(raw, buffer, size < MAX_BYTES ? size : MAX_BYTES, start + offset);
	if (count < 0)
		fuse_reply_err(req, errno);
	else
		fuse_reply_buf(req, buffer, (size_t)count);
}

static void write_file(fuse_req_t req, fuse_ino_t ino, const char *bytes, size_t size, off_t offset,
		       struct fuse_file_info *info)
{
	ssize_t count = pwrite(raw, bytes, size, start + offset);
	(void)ino, (void)info;
	if (count < 0)
		fuse_reply_err(req, errno);
	else
		fuse_reply_write(req, (size_t)count);
}

static void sync_file(fuse_req_t req, fuse_ino_t ino, int data_only, struct fuse_file_info *info)
{
	(void)ino, (void)data_only, (void)info;
	fuse_reply_err(req, fdatasync(raw) < 0 ? errno : 0);
}

static const struct fuse_lowlevel_ops operations = {
	.init = init,
	.lookup = lookup,
	.getattr = getattr,
	.open = open_file,
	.read = read_file,
	.write = write_file,
	.fsync = sync_file,
};

int main(int argc, char **argv)
{
	char *words[] = { argv[0], "-o", "fsname=floor,default_permissions", NULL };
	struct fuse_args args = FUSE_ARGS_INIT(3, words);
	struct fuse_session *session;
	int status = 1;

	if (argc != 4) {
		fprintf(stderr, "usage: %s RAWFILE START MOUNTPOINT\n", argv[0]);
		return 2;
	}
	raw = open(argv[1], O_RDWR | O_CLOEXEC);
	if (raw < 0) {
		perror(argv[1]);
		return 1;
	}
	start = strtoll(argv[2], NULL, 10);
	session = fuse_session_new(&args, &operations, sizeof operations, NULL);
	if (!session)
		return 1;
	if (fuse_set_signal_handlers(session) == 0) {
		if (fuse_session_mount(session, argv[3]) == 0) {
			status = fuse_session_loop_mt(session, 0 /* clone_fd */) < 0;
			fuse_session_unmount(session);
		}
		fuse_remove_signal_handlers(session);
	}
	fuse_session_destroy(session);
	fuse_opt_free_args(&args);
	return status;
}
