/* rival fault PAGES SLICES: a thread fills pages by userfaultfd as another touches them, on one
 *     processor; seconds for each slice.  No eviction, no encryption, no checks.
 * rival calls PAGES SLICES: another process does so, and makes all requests to the kernel that a fault
 *     of the native engine makes, but computes nothing: for each page it reads the event and copies;
 *     for each 16 pages it stops the program, reads its page map, reads 16 pages and makes them holes.
 *     Half of the pages are there at a time.
 * rival trap COUNT: so many breakpoints, for a tracer to handle. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, BATCH = 16, BLOCK = 64 };

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

static void stay_here(void)
{
    cpu_set_t here;

    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    sched_setaffinity(0, sizeof(here), &here);
}

/* What the program tells its handler: the number of its userfaultfd, and where its pages are. */
struct told {
    int uffd;
    uint64_t area;
};

/* The program: touches all pages in order, again and again. */
static void touch(int memory, size_t pages, unsigned slices, int tell, int wait)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    volatile unsigned char *area;
    struct told told;

    told.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    range.range.start = told.area = (uint64_t)area;
    range.range.len = pages * PAGE;
    if (told.uffd < 0 || area == MAP_FAILED || ioctl(told.uffd, UFFDIO_API, &api)
        || ioctl(told.uffd, UFFDIO_REGISTER, &range) || write(tell, &told, sizeof(told)) < 0
        || read(wait, &told, 1) != 1)
        end("program");
    for (unsigned slice = 0; slice <= slices; slice++) {
        double start = now();

        for (size_t i = 0; i < pages; i++)
            (void)area[i * PAGE];
        if (slice) /* in the first one half of the pages push none out */
            printf("%.9f\n", now() - start);
    }
    fflush(stdout);
    _exit(0);
}

/* Push out the next pages in order. */
static void push_out(pid_t program, int memory, int pagemap, const struct told *told, size_t page)
{
    static unsigned char contents[BATCH][PAGE];
    struct iovec parts[BATCH];
    struct user_regs_struct registers;
    uint64_t words[BLOCK];
    int status;

    for (int i = 0; i < BATCH; i++)
        parts[i] = (struct iovec){contents[i], PAGE};
    if (ptrace(PTRACE_INTERRUPT, program, 0, 0) || waitpid(program, &status, __WALL) < 0
        || ptrace(PTRACE_GETREGS, program, 0, &registers)
        || pread(pagemap, words, sizeof(words), (off_t)((told->area / PAGE + page) * 8)) < 0
        || preadv(memory, parts, BATCH, (off_t)(page * PAGE)) < 0
        || fallocate(memory, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * PAGE),
                     BATCH * PAGE))
        end("pages to push out");
}

static void serve(pid_t program, int memory, size_t pages, const struct told *told)
{
    int ended = (int)syscall(SYS_pidfd_open, program, 0), pagemap;
    int faulted = (int)syscall(SYS_pidfd_getfd, ended, told->uffd, 0);
    struct pollfd either[] = {{faulted, POLLIN, 0}, {ended, POLLIN, 0}};
    struct uffd_msg message;
    char name[64];
    size_t there = 0, oldest = 0;

    snprintf(name, sizeof(name), "/proc/%d/pagemap", program);
    pagemap = open(name, O_RDONLY);
    if (faulted < 0 || pagemap < 0)
        end("program's descriptors");
    for (;;) {
        struct uffdio_copy copy = {.src = (uint64_t)source, .len = PAGE};
        int stopped = 0;

        if (read(faulted, &message, sizeof(message)) != sizeof(message)) {
            if (poll(either, 2, -1) < 0 || either[1].revents)
                return;
            continue;
        }
        if (there == pages / 2) {
            push_out(program, memory, pagemap, told, oldest);
            oldest = (oldest + BATCH) % pages;
            there -= BATCH;
            stopped = 1;
        }
        copy.dst = message.arg.pagefault.address & -(uint64_t)PAGE;
        if (ioctl(faulted, UFFDIO_COPY, &copy) || (stopped && ptrace(PTRACE_CONT, program, 0, 0)))
            end("UFFDIO_COPY");
        there++;
    }
}

static void calls(size_t pages, unsigned slices)
{
    int memory = (int)syscall(SYS_memfd_create, "pages", 0), to[2], from[2];
    struct told told;
    pid_t program;

    pages -= pages % (2 * BATCH);
    stay_here();
    if (memory < 0 || ftruncate(memory, (off_t)(pages * PAGE)) || pipe(to) || pipe(from)
        || (program = fork()) < 0)
        end("program");
    if (program == 0)
        touch(memory, pages, slices, from[1], to[0]);
    close(from[1]);
    if (read(from[0], &told, sizeof(told)) != sizeof(told)
        || ptrace(PTRACE_SEIZE, program, 0, PTRACE_O_EXITKILL) || write(to[1], "", 1) != 1)
        end("program");
    serve(program, memory, pages, &told);
}

static void faults(size_t pages, unsigned slices)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    volatile unsigned char *area;
    pthread_t thread;

    stay_here();
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
    } else if (argc > 3 && !strcmp(argv[1], "calls")) {
        calls(strtoull(argv[2], NULL, 10), (unsigned)strtoul(argv[3], NULL, 10));
    } else if (argc > 2) {
        for (uint64_t left = strtoull(argv[2], NULL, 10); left; left--)
            __asm__ volatile("int3");
    }
    return 0;
}
