/* debugged_host ENCLAVE MODE: what each mode does is beside its name.  The status tells how it was. */

#include <pthread.h>
#include <signal.h>
#include <softsgx_host.h>
#include <sys/wait.h>

static struct sgx_enclave enclave;
static volatile struct {
    int stop, inside;
} shared;
static volatile int signals;

static long call_on(unsigned thread, unsigned long function, void *argument, size_t size)
{
    long result = 0;

    if (sgx_call(&enclave, thread, function, argument, size, &result)) {
        fprintf(stderr, "%s\n", enclave.problem);
        exit(99);
    }
    return result;
}

static long call(unsigned long function, void *argument, size_t size)
{
    return call_on(0, function, argument, size);
}

static void *count_inside(void *number)
{
    return (void *)call_on((unsigned)(uintptr_t)number, 3, NULL, 20);
}

static void *wait_outside(void *unused)
{
    while (!shared.inside)
        ;
    puts("ready");
    fflush(stdout);
    while (!shared.stop)
        ;
    return unused;
}

static void count(int number)
{
    signals += number == SIGUSR1;
}

static int twice(int value)
{
    return 2 * value;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 2 ? argv[2] : "call";

    if (argc < 2)
        return 98;
    if (sgx_load(&enclave, argv[1])) {
        fprintf(stderr, "%s\n", enclave.problem);
        return 97;
    }
    if (!strcmp(mode, "call")) /* 42 */
        return (int)call(0, NULL, 14);
    if (!strcmp(mode, "spin")) { /* one thread inside, one outside, until gdb sets stop */
        pthread_t thread;

        pthread_create(&thread, NULL, wait_outside, NULL);
        call(1, (void *)&shared, 0);
        pthread_join(thread, NULL);
        return 5;
    }
    if (!strcmp(mode, "threads")) { /* 60, three threads that count inside at the same time */
        pthread_t threads[3];
        void *turns;
        long sum = 0;

        for (uintptr_t i = 0; i < 3; i++)
            pthread_create(threads + i, NULL, count_inside, (void *)i);
        for (int i = 0; i < 3; i++) {
            pthread_join(threads[i], &turns);
            sum += (long)turns;
        }
        return (int)sum;
    }
    if (!strcmp(mode, "trap")) /* 99, after #UD inside */
        return (int)call(2, NULL, 0);
    if (!strcmp(mode, "signal")) { /* as often as the handler has run */
        signal(SIGUSR1, count);
        raise(SIGUSR1);
        raise(SIGUSR1);
        return signals;
    }
    if (!strcmp(mode, "fork")) { /* the status of a child that runs code with a breakpoint */
        int status = 0;
        pid_t child = fork();

        if (!child)
            _exit(twice(3));
        waitpid(child, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) + twice(1) : 96;
    }
    if (!strcmp(mode, "exec")) /* 42, by another image of this program */
        execl(argv[0], argv[0], argv[1], "call", NULL);
    return 95;
}
