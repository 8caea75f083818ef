/* An enclave that gives its reports and keys away, and pages out all it has before each leaf. */

#include <softsgx.h>

#include "attest.h"

enum { PAGE = 4096, BALLAST_PAGES = 64 };

/* Operands of RAW: request, report data, output. */
static uint8_t areas[3][PAGE] __attribute__((aligned(4096))) = {{IDENTITY}};

/* Touch more pages than the EPC has, and check that none has lost anything. */
static void walk(void)
{
    static uint32_t *ballast[BALLAST_PAGES], rounds;

    for (uint32_t i = 0; i < BALLAST_PAGES; i++) {
        if (!rounds && !(ballast[i] = calloc(1, PAGE)))
            sgx_abort();
        if (ballast[i][i] != rounds)
            sgx_abort();
        ballast[i][i]++;
    }
    rounds++;
}

static long seal(const struct attest *asked, uint8_t *key)
{
    struct sgx_keyrequest request = {.key_name = SGX_KEY_SEAL};
    struct sgx_report self;

    sgx_ereport(NULL, NULL, &self);
    request.key_policy = (uint16_t)asked->policy;
    request.isv_svn = self.isv_svn;
    memcpy(request.cpusvn, self.cpusvn, sizeof(request.cpusvn));
    request.attribute_mask.flags = ~(uint64_t)0;
    memcpy(request.key_id, asked->in, sizeof(request.key_id));
    walk();
    return sgx_egetkey(&request, key);
}

/* A leaf with whatever operands the host likes, which have left the EPC when it begins. */
static long raw(const struct attest *asked, uint8_t *out)
{
    uint64_t rax = asked->leaf;

    memcpy(areas[0], asked->in, sizeof(asked->in));
    memcpy(areas[1], asked->data, sizeof(asked->data));
    memset(areas[2], 0xee, sizeof(asked->out));
    walk();
    __asm__ volatile(".byte 0x0f, 0x01, 0xd7"
                     : "+a"(rax)
                     : "b"(asked->rbx), "c"(asked->rcx), "d"(asked->rdx)
                     : "cc", "memory");
    memcpy(out, areas[2], sizeof(asked->out));
    return (long)rax;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    struct attest asked;
    uint64_t where[3] = {(uint64_t)areas[0], (uint64_t)areas[1], (uint64_t)areas[2]};
    long result = 0;

    if (size != sizeof(asked))
        return -1;
    memcpy(&asked, argument, sizeof(asked));
    walk();
    switch (function) {
    case REPORT:
        sgx_ereport((void *)asked.in, asked.data, (void *)asked.out);
        break;
    case KEY:
        result = sgx_egetkey((void *)asked.in, asked.out);
        break;
    case SEAL:
        result = seal(&asked, asked.out);
        break;
    case TARGET:
        sgx_own_target((void *)asked.out);
        break;
    case AREAS:
        memcpy(asked.out, where, sizeof(where));
        break;
    case RAW:
        result = raw(&asked, asked.out);
        break;
    default:
        result = -1;
    }
    memcpy(argument, &asked, sizeof(asked));
    return result;
}
