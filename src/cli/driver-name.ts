/** The names of --driver. */
export const driverNames = ['native', 'fuse-native'] as const;
export type DriverName = (typeof driverNames)[number];
