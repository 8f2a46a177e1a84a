"""A directory as a slow disk: `python slow_disk.py DIRECTORY MOUNT_POINT BYTES_PER_SECOND SECONDS_PER_CALL`."""

import errno
import os
import pathlib
import sys
import threading
import time

import fuse

_STAT = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
_SPACE = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_flag", "f_frsize")


class SlowDisk(fuse.Operations):
    """Passes everything on to `root`; bytes are written one after the other, and calls that change names wait."""

    def __init__(self, root: str, rate: float, delay: float):
        self._root, self._rate, self._delay, self._writing = root, rate, delay, threading.Lock()

    def __call__(self, operation, path, *arguments):
        if not hasattr(self, operation):
            raise fuse.FuseOSError(errno.ENOSYS)
        if operation in ("create", "fsync", "fsyncdir", "mkdir", "rename"):
            time.sleep(self._delay)
        try:
            return getattr(self, operation)(self._root + path, *arguments)
        except OSError as error:
            raise fuse.FuseOSError(error.errno) from error

    def write(self, path, content, offset, handle):
        with self._writing:
            time.sleep(len(content) / self._rate)
        return os.pwrite(handle, content, offset)

    def read(self, path, size, offset, handle):
        return os.pread(handle, size, offset)

    def getattr(self, path, handle=None):
        status = os.lstat(path)
        return {name: getattr(status, name) for name in _STAT}

    def statfs(self, path):
        status = os.statvfs(path)
        return {name: getattr(status, name) for name in _SPACE}

    def readdir(self, path, handle):
        return [".", "..", *os.listdir(path)]

    def create(self, path, mode):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def open(self, path, flags):
        return os.open(path, flags)

    def release(self, path, handle):
        os.close(handle)

    def flush(self, path, handle):
        return 0

    def fsync(self, path, data_only, handle):
        os.fsync(handle)

    def fsyncdir(self, path, data_only, handle):
        return 0

    def rename(self, old, new):
        os.rename(old, self._root + new)

    def truncate(self, path, length, handle=None):
        os.truncate(path, length)

    def access(self, path, mode):
        if not os.access(path, mode):
            raise fuse.FuseOSError(errno.EACCES)

    def mkdir(self, path, mode):
        pathlib.Path(path).mkdir(mode)

    def rmdir(self, path):
        pathlib.Path(path).rmdir()

    def unlink(self, path):
        pathlib.Path(path).unlink()

    def chmod(self, path, mode):
        pathlib.Path(path).chmod(mode)

    def utimens(self, path, times=None):
        os.utime(path, times)


if __name__ == "__main__":
    directory, mount_point, bytes_per_second, seconds = sys.argv[1:]
    fuse.FUSE(SlowDisk(directory, float(bytes_per_second), float(seconds)), mount_point, foreground=True)
