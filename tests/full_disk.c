// Loaded before a program, lets the disk be full from one of its writes on: what is written below the folder FULL_UNDER is counted, and from
// number FULL_FROM on fails with ENOSPC. How many there were is added to the file FULL_COUNT when a process ends, where it is named.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long writes;

static int full(int fd) {
    const char *under = getenv("FULL_UNDER"), *from = getenv("FULL_FROM");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!under || length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, under, strlen(under))) return 0;
    long number = atomic_fetch_add(&writes, 1) + 1;
    return from && number >= atol(from);
}

__attribute__((destructor)) static void told(void) {
    const char *name = getenv("FULL_COUNT");
    long count = writes;
    FILE *file = name && count ? fopen(name, "a") : NULL;
    if (!file) return;
    fprintf(file, "%ld\n", count);
    fclose(file);
}

#define FAILS_IF_FULL(result, name, fd, parameters, arguments)                                                       \
    result name parameters {                                                                                         \
        if (full(fd)) return errno = ENOSPC, -1;                                                                     \
        return ((result(*) parameters)dlsym(RTLD_NEXT, #name)) arguments;                                            \
    }

FAILS_IF_FULL(ssize_t, write, fd, (int fd, const void *data, size_t size), (fd, data, size))
FAILS_IF_FULL(ssize_t, pwrite, fd, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
FAILS_IF_FULL(ssize_t, pwrite64, fd, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
FAILS_IF_FULL(int, ftruncate, fd, (int fd, off_t size), (fd, size))
FAILS_IF_FULL(int, ftruncate64, fd, (int fd, off64_t size), (fd, size))
FAILS_IF_FULL(ssize_t, copy_file_range, to, (int from, off64_t *at, int to, off64_t *put, size_t size, unsigned flags), (from, at, to, put, size, flags))
FAILS_IF_FULL(ssize_t, sendfile, to, (int to, int from, off_t *at, size_t size), (to, from, at, size))
FAILS_IF_FULL(ssize_t, sendfile64, to, (int to, int from, off64_t *at, size_t size), (to, from, at, size))
