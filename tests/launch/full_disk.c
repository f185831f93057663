/* A disk that is full from the k-th write on, for the files under one folder.

   Loaded into a test's process with LD_PRELOAD, so that it meets the writes of Tensorstore's C++ as
   well as Python's. Writes are everything that needs space: write and its kin, new files, new
   folders. `full_disk_arm(folder, k)` starts to count; `full_disk_disarm()` frees the disk and
   returns how many writes were counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static atomic_int armed, count, first;

static int full(const char *path) {
  if (!armed || strncmp(path, folder, strlen(folder))) return 0;
  if (atomic_fetch_add(&count, 1) + 1 < first) return 0;
  errno = ENOSPC;
  return 1;
}

static int full_file(int file) {
  char link[64], path[4096];
  if (!armed) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return full(path);
}

static int full_at(int parent, const char *path) {
  char link[64], whole[8192];
  if (!armed) return 0;
  if (path[0] == '/') return full(path);
  snprintf(link, sizeof link, parent == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", parent);
  ssize_t size = readlink(link, whole, 4095);
  if (size < 0) return 0;
  snprintf(whole + size, sizeof whole - size, "/%s", path);
  return full(whole);
}

void full_disk_arm(const char *path, int k) {
  snprintf(folder, sizeof folder, "%s", path);
  count = 0;
  first = k;
  armed = 1;
}

int full_disk_disarm(void) {
  armed = 0;
  return count;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
  return full_file(file) ? -1 : NEXT(write)(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
  return full_file(file) ? -1 : NEXT(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  return full_file(file) ? -1 : NEXT(pwrite64)(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
  return full_file(file) ? -1 : NEXT(writev)(file, parts, number);
}
ssize_t pwritev(int file, const struct iovec *parts, int number, off_t at) {
  return full_file(file) ? -1 : NEXT(pwritev)(file, parts, number, at);
}
int mkdir(const char *path, mode_t mode) {
  return full_at(AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode);
}
int mkdirat(int parent, const char *path, mode_t mode) {
  return full_at(parent, path) ? -1 : NEXT(mkdirat)(parent, path, mode);
}

#define OPEN(name)                                                      \
  int name(const char *path, int flags, ...) {                          \
    va_list rest;                                                       \
    va_start(rest, flags);                                              \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                       \
    if (flags & O_CREAT && full_at(AT_FDCWD, path)) return -1;          \
    return NEXT(name)(path, flags, mode);                               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
  int name(int parent, const char *path, int flags, ...) {              \
    va_list rest;                                                       \
    va_start(rest, flags);                                              \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                       \
    if (flags & O_CREAT && full_at(parent, path)) return -1;            \
    return NEXT(name)(parent, path, flags, mode);                       \
  }
OPENAT(openat)
OPENAT(openat64)
