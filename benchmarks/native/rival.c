/* rival fault PAGES SLICES: a thread fills pages by userfaultfd as another touches them, on one
 *     processor; seconds for each slice.  No eviction, no encryption, no checks.
 * rival trap COUNT: so many breakpoints, for a tracer to handle. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static int uffd;
static unsigned char source[PAGE] __attribute__((aligned(4096)));

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void end(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(3);
}

static void *fill(void *unused)
{
    struct uffd_msg message;

    while (read(uffd, &message, sizeof(message)) == sizeof(message)) {
        struct uffdio_copy copy = {0};

        copy.dst = message.arg.pagefault.address & -(uint64_t)PAGE;
        copy.src = (uint64_t)source;
        copy.len = PAGE;
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            end("UFFDIO_COPY");
    }
    return unused;
}

static void faults(size_t pages, unsigned slices)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    volatile unsigned char *area;
    cpu_set_t here;
    pthread_t thread;

    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    sched_setaffinity(0, sizeof(here), &here);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        end("userfaultfd");
    area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        end("mmap");
    range.range.start = (uint64_t)area;
    range.range.len = pages * PAGE;
    if (ioctl(uffd, UFFDIO_REGISTER, &range))
        end("UFFDIO_REGISTER");
    if (pthread_create(&thread, NULL, fill, NULL))
        end("thread");
    for (unsigned slice = 0; slice < slices; slice++) {
        double start = now();

        for (size_t i = 0; i < pages; i++)
            (void)area[i * PAGE];
        printf("%.9f\n", now() - start);
        madvise((void *)area, pages * PAGE, MADV_DONTNEED);
    }
    fflush(stdout);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc > 3 && !strcmp(argv[1], "fault")) {
        faults(strtoull(argv[2], NULL, 10), (unsigned)strtoul(argv[3], NULL, 10));
    } else if (argc > 2) {
        for (uint64_t left = strtoull(argv[2], NULL, 10); left; left--)
            __asm__ volatile("int3");
    }
    return 0;
}
