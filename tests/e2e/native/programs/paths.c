/* Calls with paths, each often enough that the supervisor replaces code of the C library.
 * Prints what each gives; the argument is a directory to work in.  With a second argument the
 * program has two threads, and makes the calls on one path only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define TIMES 6
#define PAGE 4096
#define THREADS 3

static volatile sig_atomic_t faults, alarms, astray;
static volatile int device = -1, looking = 1;

/* One letter for each kind of answer: the same in each of TIMES calls, or '!'. */
static void show(const char *what, long (*call)(const char *), const char *path)
{
    long first = 0;
    int failed = 0, same = 1;

    for (int i = 0; i < TIMES; i++) {
        errno = 0;
        long result = call(path);
        int error = result < 0 ? errno : 0;

        if (!i)
            first = result, failed = error;
        else
            same &= result == first && error == failed;
    }
    printf("%s %s: %ld %d%s\n", what, !strcmp(what, "unreadable") ? "" : path > (char *)PAGE ? path : "bad", first, failed, same ? "" : " !");
}

static long look(const char *path) { return access(path, R_OK); }

static long look_at(const char *path) { return faccessat(AT_FDCWD, path, X_OK, 0); }

static long link_of(const char *path)
{
    char text[64];

    return readlink(path, text, sizeof text);
}

static long kind(const char *path)
{
    struct stat info;

    return stat(path, &info) ? -1 : (long)(info.st_mode & S_IFMT);
}

static long own_kind(const char *path)
{
    struct stat info;

    return lstat(path, &info) ? -1 : (long)(info.st_mode & S_IFMT);
}

static long extended_kind(const char *path)
{
    struct statx info;

    return statx(AT_FDCWD, path, 0, STATX_MODE, &info) ? -1 : info.stx_mode & S_IFMT;
}

static long opened(const char *path)
{
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);

    if (descriptor >= 0)
        close(descriptor);
    return descriptor < 0 ? -1 : 0;
}

static long kind_of_descriptor(int descriptor)
{
    struct stat info, also;

    if (fstat(descriptor, &info) || fstatat(descriptor, "", &also, AT_EMPTY_PATH))
        return -errno;
    return info.st_mode == also.st_mode ? (long)(info.st_mode & S_IFMT) : -1;
}

static void all(const char *path)
{
    show("access", look, path);
    show("faccessat", look_at, path);
    show("readlink", link_of, path);
    show("stat", kind, path);
    show("lstat", own_kind, path);
    show("statx", extended_kind, path);
    show("open", opened, path);
}

static void on_fault(int number)
{
    (void)number;
    faults++;
}

/* Code of the vDSO calls nothing here, so no thread of ours can be there. */
static void on_alarm(int number, siginfo_t *info, void *context)
{
    unsigned long at = (unsigned long)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];

    (void)number;
    (void)info;
    astray += at - getauxval(AT_SYSINFO_EHDR) < 64 * PAGE;
    alarms++;
}

static void set_handler(int number, int flags)
{
    struct sigaction action = {.sa_sigaction = on_alarm, .sa_flags = SA_SIGINFO | flags};

    sigaction(number, &action, NULL);
}

/* Paths that end where a mapping ends, and one that goes on in the next page. */
static void at_the_end_of_a_page(void)
{
    char *pages = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const char *name = "/dev/sgx_enclave";

    mprotect(pages + 2 * PAGE, PAGE, PROT_NONE);
    for (int bytes = 1; bytes < 12; bytes++) {
        char *path = pages + 2 * PAGE - bytes;

        memcpy(path, "/devicepath", (size_t)bytes);
        path[bytes - 1] = 0;
        printf("%d ", bytes);
        show("short", look, path);
    }
    for (int bytes = 1; bytes < 12; bytes++) {
        char *path = strcpy(pages + PAGE - bytes, name);

        show("across", kind, path);
    }
    memset(pages + 2 * PAGE - 4, 'x', 4);
    for (int i = 0; i < TIMES; i++) {
        int result = access(pages + 2 * PAGE - 4 - 8 * i, R_OK);

        printf("no end: %d %d\n", result, errno);
        memset(pages + 2 * PAGE - 12 - 8 * i, 'x', 8);
    }
    munmap(pages, 3 * PAGE);
}

static void while_signals_arrive(const char *fifo)
{
    struct itimerval soon = {{0, 0}, {0, 150}}, often = {{0, 30000}, {0, 30000}}, never = {{0, 0}, {0, 0}};
    int wrong = 0, seen = -1, result;

    set_handler(SIGALRM, SA_RESTART);
    for (int i = 0; i < 20000 || (alarms < 20 && i < 10000000); i++) {
        if (alarms != seen) { /* not before a call is made: signals may take longer than their interval */
            seen = alarms;
            setitimer(ITIMER_REAL, &soon, NULL);
        }
        wrong += look("/nonexistent/file") != -1 || look("/dev/null") != 0;
    }
    setitimer(ITIMER_REAL, &never, NULL);
    printf("alarms: %d wrong %d in our code %d\n", alarms >= 20, wrong, (int)astray);

    for (int i = 0; i < TIMES; i++) {
        set_handler(SIGALRM, 0);
        setitimer(ITIMER_REAL, &often, NULL); /* the first may come before the call */
        result = open(fifo, O_RDONLY | O_CLOEXEC);
        setitimer(ITIMER_REAL, &never, NULL);
        printf("interrupted: %d %d\n", result, errno);
    }
    for (int i = 0; i < 2; i++) {
        pid_t writer;

        set_handler(SIGALRM, SA_RESTART);
        fflush(stdout);
        writer = fork();
        if (!writer) {
            usleep(100000);
            _exit(open(fifo, O_WRONLY) < 0);
        }
        setitimer(ITIMER_REAL, &often, NULL);
        result = open(fifo, O_RDONLY | O_CLOEXEC);
        setitimer(ITIMER_REAL, &never, NULL);
        printf("restarted: %d\n", result >= 0);
        close(result);
        waitpid(writer, NULL, 0);
    }
}

static void *watch(void *unused)
{
    long wrong = 0;

    (void)unused;
    while (looking) {
        int mine = device;

        if (mine >= 0)
            wrong += kind_of_descriptor(mine) != S_IFCHR;
        else
            kind_of_descriptor(0);
        look("/nonexistent/file");
    }
    return (void *)wrong;
}

static void when_a_device_is_opened(void)
{
    pthread_t threads[THREADS];
    char name[64], target[64] = {0};
    long wrong = 0;

    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, watch, NULL);
    usleep(50000);
    device = open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC);
    usleep(50000);
    looking = 0;
    for (int i = 0; i < THREADS; i++) {
        void *result;

        pthread_join(threads[i], &result);
        wrong += (long)result;
    }
    printf("device: %d %ld wrong %ld\n", device >= 0, kind_of_descriptor(device), wrong);
    snprintf(name, sizeof name, "/proc/self/fd/%d", device);
    printf("link: %ld %s\n", (long)readlink(name, target, sizeof target - 1), target);
}

static void *idle(void *unused)
{
    return pause(), unused;
}

int main(int count, char **arguments)
{
    pthread_t thread;
    char text[8192] = {0}, *unreadable;
    FILE *info;

    if (count < 2 || chdir(arguments[1]))
        return 2;
    signal(SIGSEGV, on_fault);
    signal(SIGBUS, on_fault);
    close(open("file", O_CREAT | O_RDWR, 0600));
    if (count > 2) { /* with a second thread from the start */
        pthread_create(&thread, NULL, idle, NULL);
        all("file");
        return 0;
    }
    if (symlink("file", "link") || mkfifo("fifo", 0600))
        return 3;
    all("file");
    all("link");
    all("/nonexistent/file");
    all("");
    all("/dev/null");
    all("/dev/sgx_enclave");
    all("/dev/sgx/provision");
    all("/dev/sgx");
    all("/dev/sgx_enclave/");
    all("/dev/sgx_enclavex");
    all("/proc/cpuinfo");
    all("/sys/fs/cgroup/softsgx/misc.max");
    all(NULL);
    all((char *)8);
    unreadable = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    show("unreadable", look, unreadable + 8);
    printf("faults: %d\n", (int)faults);
    info = fopen("/proc/cpuinfo", "r");
    while (info && fgets(text, sizeof text, info) && strncmp(text, "flags", 5)) {
    }
    printf("cpuinfo: %d\n", strstr(text, " sgx") != NULL);
    at_the_end_of_a_page();
    while_signals_arrive("fifo");
    for (int i = 0; i < TIMES; i++)
        printf("standard output: %d\n", kind_of_descriptor(1) == S_IFREG);
    fflush(stdout);
    if (!fork()) {
        when_a_device_is_opened();
        all("/dev/sgx_enclave");
        all("file");
        printf("in the child: %d\n", kind_of_descriptor(1) == S_IFREG);
        return 0;
    }
    wait(NULL);
    when_a_device_is_opened();
    all("/dev/sgx_enclave");
    all("file");
    printf("standard output: %d\n", kind_of_descriptor(1) == S_IFREG);
    return 0;
}
