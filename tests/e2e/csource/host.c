/* Checks what the runtime and the host header promise; exit status 1 and a line at the first thing
 * that is not so. */

#include <softsgx_host.h>

#include <pthread.h>

#include "agreed.h"

enum { CALLS = 200 };

static struct sgx_enclave enclave;

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, enclave.problem);      \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

static long ask(unsigned thread, unsigned long function)
{
    long result = -99;

    CHECK(sgx_call(&enclave, thread, function, NULL, 0, &result) == 0);
    return result;
}

static void *enter_often(void *number)
{
    for (int i = 0; i < CALLS; i++)
        CHECK(ask((unsigned)(uintptr_t)number, ENTER) == (long)(uintptr_t)number);
    return NULL;
}

static void threads(void)
{
    pthread_t other[2];

    for (uintptr_t i = 0; i < 2; i++)
        CHECK(pthread_create(&other[i], NULL, enter_often, (void *)i) == 0);
    for (int i = 0; i < 2; i++)
        pthread_join(other[i], NULL);
    CHECK(ask(0, ENTERED) == 2 * CALLS);
    CHECK(ask(1, CONSTRUCTED) == 1);
}

static uint64_t left_in_registers[2 * 16 + 3];

/* Called by the vDSO right after EEXIT. */
static int look(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_run *run)
{
    __asm__ volatile("movdqu %%xmm0, 0(%0)\n\tmovdqu %%xmm7, 112(%0)\n\t"
                     "movdqu %%xmm8, 128(%0)\n\tmovdqu %%xmm15, 240(%0)"
                     :
                     : "r"(left_in_registers)
                     : "memory");
    left_in_registers[32] = (uint64_t)rdx;
    left_in_registers[33] = (uint64_t)r8;
    left_in_registers[34] = (uint64_t)r9;
    (void)rdi, (void)rsp, (void)run;
    return (int)rsi;
}

/* Call with a number in each register that the ABI keeps; 0 when each is still there after. */
#define KEEPING(name, call)                                                                    \
    static __attribute__((naked, noinline)) uint64_t name(                                     \
        void *enter, uint64_t rdi, uint64_t rsi, uint64_t rdx, unsigned function,              \
        struct sgx_run *run)                                                                   \
    {                                                                                          \
        __asm__("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\t"       \
                "pushq %r15\n\tpushq %r9\n\t"                                                 \
                "movl $1, %ebp\n\tmovl $2, %ebx\n\tmovl $3, %r12d\n\tmovl $4, %r13d\n\t"      \
                "movl $5, %r14d\n\tmovl $6, %r15d\n\t" call                                   \
                "xorl $1, %ebp\n\txorl $2, %ebx\n\txorl $3, %r12d\n\txorl $4, %r13d\n\t"      \
                "xorl $5, %r14d\n\txorl $6, %r15d\n\torl %ebp, %eax\n\torl %ebx, %eax\n\t"    \
                "orl %r12d, %eax\n\torl %r13d, %eax\n\torl %r14d, %eax\n\torl %r15d, %eax\n\t"  \
                "addq $8, %rsp\n\tpopq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\t"       \
                "popq %rbx\n\tpopq %rbp\n\tret");                                            \
    }

/* By the header's wrapper, and by the vDSO alone; its seventh argument is the last push. */
KEEPING(through_wrapper, "call sgx__enter\n\t")
KEEPING(through_vdso, "movq %rdi, %rax\n\tmovq %rsi, %rdi\n\tmovq %rdx, %rsi\n\t"
                      "movq %rcx, %rdx\n\tmovl %r8d, %ecx\n\tcall *%rax\n\t")

static void kept_registers(void)
{
    struct sgx_run run = {.tcs = enclave.tcs[0]}, lost = {.tcs = enclave.tcs[1]};

    CHECK(through_vdso(enclave.enter, FILL, 0, 0, SGX__EENTER, &run) == 0);
    CHECK(through_wrapper(enclave.enter, FILL, 0, 0, SGX__EENTER, &run) == 0);
    /* An exception clears R8 to R15. */
    CHECK(through_wrapper(enclave.enter, UNDEFINED, 0, 0, SGX__EENTER, &lost) == 0);
    CHECK(lost.function == 3 && lost.exception_vector == 6);
}

static void nothing_is_left_in_registers(void)
{
    struct sgx_run run = {.tcs = enclave.tcs[0], .user_handler = (uint64_t)look};
    uint32_t before = 0x9f80, after; /* flush to zero */
    uint16_t fcw_before = 0x27f, fcw_after;

    CHECK(sgx__enter(enclave.enter, FILL, 0, 0, SGX__EENTER, &run) == 0);
    for (unsigned i = 0; i < sizeof(left_in_registers) / sizeof(left_in_registers[0]); i++)
        CHECK(left_in_registers[i] == 0);
    __asm__ volatile("ldmxcsr %0\n\tfldcw %1" : : "m"(before), "m"(fcw_before));
    CHECK(ask(0, CONTROL) == 0);
    __asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(after), "=m"(fcw_after));
    CHECK(after == before && fcw_after == fcw_before);
}

static void arguments(void)
{
    struct shared shared = {40, 2, 0};
    long result;

    CHECK(sgx_call(&enclave, 0, ADD, &shared, sizeof(shared), &result) == 0);
    CHECK(result == -42 && shared.sum == 42);
    CHECK(sgx_call(&enclave, 0, ADD, (void *)enclave.base, 8, &result) == -1 && errno == EINVAL);
    CHECK(sgx_call(&enclave, 0, ADD, (void *)(enclave.base - 8), 16, &result) == -1);
    CHECK(sgx_call(&enclave, 2, ADD, NULL, 0, &result) == -1 && errno == EINVAL);
}

/* The thread is lost, the enclave is not. */
static void exceptions(void)
{
    long result;

    CHECK(sgx_call(&enclave, 1, UNDEFINED, NULL, 0, &result) == -1 && errno == EFAULT);
    CHECK(enclave.run[1].exception_vector == 6);
    CHECK(sgx_call(&enclave, 1, TABLE, NULL, 0, &result) == -1 && errno == EBUSY);
    CHECK(ask(0, TABLE) == 6 * 7 + 9 + 4);
}

static void lose(unsigned long function, unsigned vector)
{
    CHECK(sgx_call(&enclave, 0, function, NULL, 0, NULL) == -1 && errno == EFAULT);
    CHECK(enclave.run[0].exception_vector == vector);
}

int main(int argc, char **argv)
{
    const char *path = argv[1], *missing = "/nonexistent.sgxs";

    CHECK(argc == 2);
    CHECK(sgx_load(&enclave, missing) == -1 && strstr(enclave.problem, missing));
    CHECK(sgx_load(&enclave, path) == 0);
    CHECK(enclave.threads == 2 && enclave.size == ENCLAVE_BYTES);
    CHECK(ask(0, TABLE) == 6 * 7 + 9 + 4);
    CHECK(ask(0, HEAP) == 0);
    CHECK(ask(0, COPIES) == 0);
    CHECK(ask(0, RANGES) == 0);
    arguments();
    nothing_is_left_in_registers();
    threads();
    exceptions();
    lose(FREE_TWICE, 6);
    sgx_unload(&enclave);

    CHECK(sgx_load(&enclave, path) == 0);
    CHECK(ask(0, ENTERED) == 0); /* a new enclave, not the old one */
    kept_registers();
    lose(OVERFLOW, 14);          /* the guard below the stack */
    sgx_unload(&enclave);
    puts("every promise kept");
    return 0;
}
