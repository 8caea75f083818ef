/* host ENCLAVE compute SLICES PASSES: seconds of each slice of work, inside and outside in turn
 * host ENCLAVE ecall COUNT SLICES: seconds of COUNT calls that do nothing, for each slice
 * host ENCLAVE own COUNT SLICES: the same by an ENCLU of this program
 * host ENCLAVE clear COUNT SLICES: the same with calls that clear extended state twice
 * host ENCLAVE threads THREADS COUNT SLICES: seconds of COUNT calls by each of THREADS at once
 * host ENCLAVE functions THREADS COUNT SLICES: the same with a C function by its address
 * host ENCLAVE touch PAGES ROUNDS SLICES: seconds of touching so many pages so often, for each
 * host ENCLAVE scatter PAGES ROUNDS SLICES: the same in another order than theirs */

#include <softsgx_host.h>
#include <pthread.h>
#include <time.h>

#include "work.h"

enum { MOST_THREADS = 8 };

static struct sgx_enclave enclave;
static uint64_t words[WORDS] __attribute__((aligned(4096)));

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static long call(unsigned long function, uint64_t one, uint64_t two)
{
    uint64_t numbers[2] = {one, two};
    long result;

    if (sgx_call(&enclave, 0, function, numbers, sizeof(numbers), &result)) {
        fprintf(stderr, "%s\n", enclave.problem);
        exit(1);
    }
    if (result < 0) {
        fprintf(stderr, "function %lu: a page does not hold what was stored there\n", function);
        exit(1);
    }
    return result;
}

static void compute(uint64_t slices, uint64_t passes)
{
    for (uint64_t i = 0; i < slices; i++) {
        double start = now();
        long inside = call(COMPUTE, passes, 0);
        double middle = now();
        long outside = (long)(work(words, passes) >> 1);
        double end = now();

        if (inside != outside) {
            fprintf(stderr, "inside and outside differ\n");
            exit(1);
        }
        printf("%.9f %.9f\n", middle - start, end - middle);
    }
}

/* As __vdso_sgx_enter_enclave enters, for calls without an exception inside. */
extern char own_enter[];
__asm__(".text\n"
        "own_enter:\n"
        "push %rbp\n"
        "mov %rsp, %rbp\n"
        "push %rbx\n"
        "mov 16(%rbp), %rbx\n"
        "mov (%rbx), %rbx\n"
        "lea 1f(%rip), %rcx\n"
        "mov $2, %eax\n"
        ".byte 0x0f, 0x01, 0xd7\n"
        "mov 16(%rbp), %rbx\n"
        "movl $4, 8(%rbx)\n"
        "mov -8(%rbp), %rbx\n"
        "leave\n"
        "xor %eax, %eax\n"
        "ret\n"
        "1: .byte 0x0f, 0x01, 0xd7\n");

static void ecalls(unsigned long function, uint64_t count, uint64_t slices)
{
    for (uint64_t i = 0; i < slices; i++) {
        double start = now();

        for (uint64_t n = 0; n < count; n++)
            call(function, 0, 0);
        printf("%.9f\n", now() - start);
    }
}

/* One of several threads that do the same at once, from the barrier on. */
struct member {
    pthread_t thread;
    pthread_barrier_t *start;
    unsigned number;
    uint64_t count;
    int inside;
};

static __attribute__((noinline)) void nothing(void)
{
    __asm__ volatile("");
}

static void (*volatile function)(void) = nothing;

static void *work_along(void *argument)
{
    struct member *member = argument;
    long result;

    pthread_barrier_wait(member->start);
    for (uint64_t n = 0; n < member->count; n++) {
        if (!member->inside)
            function();
        else if (sgx_call(&enclave, member->number, NOTHING, NULL, 0, &result))
            exit(1);
    }
    return NULL;
}

static void together(unsigned threads, uint64_t count, uint64_t slices, int inside)
{
    struct member members[MOST_THREADS];
    pthread_barrier_t start;

    pthread_barrier_init(&start, NULL, threads + 1);
    for (uint64_t i = 0; i < slices; i++) {
        double before;

        for (unsigned n = 0; n < threads; n++) {
            members[n] = (struct member){.start = &start, .number = n, .count = count,
                                         .inside = inside};
            if (pthread_create(&members[n].thread, NULL, work_along, &members[n]))
                exit(1);
        }
        pthread_barrier_wait(&start);
        before = now();
        for (unsigned n = 0; n < threads; n++)
            pthread_join(members[n].thread, NULL);
        printf("%.9f\n", now() - before);
    }
}

static void touch(unsigned long how, uint64_t pages, uint64_t rounds, uint64_t slices)
{
    call(PREPARE, pages, 0);
    call(how, pages, 1);
    for (uint64_t i = 0; i < slices; i++) {
        double start = now();

        call(how, pages, rounds);
        printf("%.9f\n", now() - start);
    }
}

int main(int argc, char **argv)
{
    uint64_t numbers[3] = {0, 0, 0};

    if (argc < 4)
        return 2;
    for (int i = 3; i < argc && i < 6; i++)
        numbers[i - 3] = strtoull(argv[i], NULL, 10);
    if (sgx_load(&enclave, argv[1])) {
        fprintf(stderr, "%s\n", enclave.problem);
        return 1;
    }
    if (!strcmp(argv[2], "compute"))
        compute(numbers[0], numbers[1]);
    else if (!strcmp(argv[2], "own")) {
        enclave.enter = own_enter;
        ecalls(NOTHING, numbers[0], numbers[1]);
    } else if (!strcmp(argv[2], "ecall") || !strcmp(argv[2], "clear"))
        ecalls(strcmp(argv[2], "clear") ? NOTHING : CLEAR, numbers[0], numbers[1]);
    else if (!strcmp(argv[2], "threads") || !strcmp(argv[2], "functions"))
        together((unsigned)numbers[0], numbers[1], numbers[2], !strcmp(argv[2], "threads"));
    else
        touch(strcmp(argv[2], "scatter") ? TOUCH : SCATTER, numbers[0], numbers[1], numbers[2]);
    sgx_unload(&enclave);
    return 0;
}
