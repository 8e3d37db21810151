/* Makes reads fail for real: preload it, and map the file that FAULTY names into memory.

   The file holds int32: kind of fault, reads that still work, reads that then fail (-1: all),
   and reads seen. Only scatter reads are touched, which only expert readers make. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile int32_t *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTY");
    int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0) return;
    void *memory = mmap(0, 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory != MAP_FAILED) control = memory;
}

static ssize_t faulty(int fd, const struct iovec *iov, int count, off64_t offset) {
    static ssize_t (*real)(int, const struct iovec *, int, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "preadv64");
    if (control && control[0]) {
        __sync_fetch_and_add(&control[3], 1);
        if (__sync_fetch_and_sub(&control[1], 1) <= 0 && control[2]) {
            if (control[2] > 0) __sync_fetch_and_sub(&control[2], 1);
            switch (control[0]) {
            case 1000: /* one byte at a time, or a page where reads are by blocks */
                {
                    size_t some = iov[0].iov_len % 4096 ? 1 : 4096;
                    struct iovec first = {iov[0].iov_base, some < iov[0].iov_len ? some : iov[0].iov_len};
                    return real(fd, &first, 1, offset);
                }
            case 1001: /* a slow drive */
                usleep(1500000);
                return real(fd, iov, count, offset);
            case 1002: /* the end of the file */
                return 0;
            default:
                errno = control[0];
                return -1;
            }
        }
    }
    return real(fd, iov, count, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset) {
    return faulty(fd, iov, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *iov, int count, off64_t offset) {
    return faulty(fd, iov, count, offset);
}
ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    return faulty(fd, iov, count, offset);
}
ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags) {
    return faulty(fd, iov, count, offset);
}
