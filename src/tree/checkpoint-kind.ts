/** The folder of each kind of checkpoint in a disk's directory. */
export const folderOf = { internal: 'snapshots', external: 'overlays' } as const;
