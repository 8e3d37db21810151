/* Pauses threads at random: tests that depend on how threads come about fail under it.
 *
 *     gcc -O2 -shared -fPIC -o /tmp/pauses.so tests/pauses.c -ldl
 *     LD_PRELOAD=/tmp/pauses.so pytest -q
 *
 * For Linux. After a lock, a semaphore, a read or a send, the thread sleeps now and then: most
 * pauses last some 35 ms, a quarter of them 100 to 300 ms, one in twenty up to 1.3 s. There is one
 * such pause in 50 to 550 ms of a process. PAUSES=2 makes all of them twice as long.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static _Atomic long long next_pause; /* ns of the monotonic clock */

static void pause_perhaps(void) {
  static __thread unsigned seed;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  long long at = now.tv_sec * 1000000000LL + now.tv_nsec, due = atomic_load(&next_pause);
  if (at < due) return;
  if (!seed) seed = (unsigned)(at ^ (long long)(size_t)&seed) | 1;
  long long gap = (50 + rand_r(&seed) % 500) * 1000000LL;
  if (!atomic_compare_exchange_strong(&next_pause, &due, at + gap)) return; /* another one does */
  int kind = rand_r(&seed) % 20;
  double ms = kind == 0  ? 400 + rand_r(&seed) % 900
              : kind < 6 ? 100 + rand_r(&seed) % 200
                         : 5 + rand_r(&seed) % 60;
  const char *times = getenv("PAUSES");
  if (times) ms *= atof(times);
  struct timespec pause = {(time_t)(ms / 1000), (long)(ms * 1e6) % 1000000000L};
  nanosleep(&pause, NULL);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
  static __typeof__(&pthread_cond_wait) real; /* dlsym may find the version of 1999 */
  if (!real) real = (__typeof__(real))dlvsym(RTLD_NEXT, "pthread_cond_wait", "GLIBC_2.3.2");
  if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, "pthread_cond_wait");
  int result = real(condition, mutex);
  pause_perhaps();
  return result;
}

int sem_wait(sem_t *semaphore) {
  REAL(sem_wait);
  int result = real(semaphore);
  pause_perhaps();
  return result;
}

int sem_post(sem_t *semaphore) {
  REAL(sem_post);
  int result = real(semaphore);
  pause_perhaps();
  return result;
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
  REAL(preadv);
  pause_perhaps();
  return real(fd, parts, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
  REAL(preadv64);
  pause_perhaps();
  return real(fd, parts, count, offset);
}

ssize_t pread64(int fd, void *buffer, size_t count, off64_t offset) {
  REAL(pread64);
  pause_perhaps();
  return real(fd, buffer, count, offset);
}

ssize_t send(int fd, const void *buffer, size_t count, int flags) {
  REAL(send);
  pause_perhaps();
  return real(fd, buffer, count, flags);
}

ssize_t recv(int fd, void *buffer, size_t count, int flags) {
  REAL(recv);
  ssize_t result = real(fd, buffer, count, flags);
  pause_perhaps();
  return result;
}
