/* What happens between the entry code and ecall(): relocation, once, and the argument's check. */

#include <softsgx.h>

/* One read-only page of each thread, behind its SSA frames; `softsgx build` fills it in, and it is
 * measured.  Offsets are from the enclave's base. */
struct thread_page {
    uint64_t offset;    /* of this page */
    uint64_t size;      /* of the enclave */
    uint64_t heap;      /* where the heap begins */
    uint64_t heap_size;
    uint64_t number;    /* of this thread */
};

#define THREAD_PAGE_FROM_TCS 0x3000 /* TCS, two SSA frames */
#define R_X86_64_RELATIVE 8

struct rela {
    uint64_t offset, info;
    int64_t addend;
};

struct answer {
    long result, status; /* RAX and RDX, by the ABI */
};

/* Hidden, so that no compiler looks for them in a table that has to be relocated first. */
#pragma GCC visibility push(hidden)
extern const struct rela __sgx_rela_start[], __sgx_rela_end[];
extern void (*const __sgx_init_start[])(void);
extern void (*const __sgx_init_end[])(void);
#pragma GCC visibility pop

void sgx__heap_init(unsigned char *start, size_t size);
struct answer sgx__dispatch(unsigned long function, void *argument, size_t size,
                            const unsigned char *tcs);

static uint64_t base, enclave_size;
static enum { UNTOUCHED, STARTING, READY } state;

static const struct thread_page *page_of(const unsigned char *tcs)
{
    return (const struct thread_page *)(tcs + THREAD_PAGE_FROM_TCS);
}

/* The image was linked at 0.  Nothing here may use an address from initialised data before this
 * has run. */
static void relocate(uint64_t at)
{
    for (const struct rela *rela = __sgx_rela_start; rela < __sgx_rela_end; rela++)
        *(uint64_t *)(at + rela->offset) = at + (uint64_t)rela->addend;
}

static void start(const struct thread_page *page)
{
    int untouched = UNTOUCHED;

    if (__atomic_compare_exchange_n((int *)&state, &untouched, STARTING, 0, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
        base = (uint64_t)page - page->offset;
        enclave_size = page->size;
        relocate(base);
        sgx__heap_init((unsigned char *)(base + page->heap), page->heap_size);
        for (void (*const *init)(void) = __sgx_init_start; init < __sgx_init_end; init++)
            (*init)();
        __atomic_store_n((int *)&state, READY, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n((int *)&state, __ATOMIC_ACQUIRE) != READY)
        __builtin_ia32_pause();
}

struct answer sgx__dispatch(unsigned long function, void *argument, size_t size,
                            const unsigned char *tcs)
{
    struct answer answer = {0, SGX__DONE};

    start(page_of(tcs));
    if (size && !sgx_is_outside(argument, size)) {
        answer.status = SGX__POINTER;
        return answer;
    }
    answer.result = ecall(function, argument, size);
    return answer;
}

int sgx_is_outside(const void *address, size_t size)
{
    uint64_t first = (uint64_t)address, end = first + size;

    return end >= first && (end <= base || first >= base + enclave_size);
}

int sgx_is_inside(const void *address, size_t size)
{
    uint64_t first = (uint64_t)address, end = first + size;

    return end >= first && first >= base && end <= base + enclave_size;
}

unsigned sgx_thread(void)
{
    uint64_t number;

    /* EENTER has pointed GS at the thread's page. */
    __asm__("movq %%gs:%c1, %0" : "=r"(number) : "i"(offsetof(struct thread_page, number)));
    return (unsigned)number;
}

void sgx_abort(void)
{
    __builtin_trap();
}
