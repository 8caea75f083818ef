/* The inside: what an enclave built by `softsgx build` may use.
 *
 * You write one function, ecall(); the host reaches it with sgx_call() of softsgx_host.h:
 *
 *     #include <softsgx.h>
 *
 *     long ecall(unsigned long function, void *argument, size_t size) { return 6 * 7; }
 *
 * There is no C library and there are no system calls.  Vector registers are SSE2's.
 */
#ifndef SOFTSGX_H
#define SOFTSGX_H

#include <stddef.h>
#include <stdint.h>

#include <softsgx_keys.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Yours.  `argument` is the host's: `size` bytes, all outside the enclave or none, which was
 * checked; what they hold was not, and the host can change it while you look.  Copy first, check
 * the copy, and check every pointer in it with sgx_is_outside(). */
long ecall(unsigned long function, void *argument, size_t size);

/* Whether all of [address, address + size) is outside, or inside, the enclave.  A range that
 * wraps around is neither. */
int sgx_is_outside(const void *address, size_t size);
int sgx_is_inside(const void *address, size_t size);

/* Which thread this is: 0 up to --threads minus 1. */
unsigned sgx_thread(void);

/* Ends the call with an undefined-instruction exception; the thread cannot be entered again. */
void sgx_abort(void) __attribute__((noreturn));

/* The heap: --heap bytes, shared by all threads. Sixteen-byte aligned; NULL when there is no room. */
void *malloc(size_t size);
void *calloc(size_t count, size_t size);
void *realloc(void *block, size_t size);
void free(void *block);

void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *one, const void *other, size_t size);
size_t strlen(const char *text);

/* EREPORT: what this enclave is and the 64 bytes of `data` (NULL for zeros), MACed for `target`
 * alone.  Operands lie anywhere; reserved bytes that are not zero end the call with #GP. */
void sgx_ereport(const struct sgx_targetinfo *target, const void *data, struct sgx_report *report);

/* What others name in EREPORT to have their report verified here. */
void sgx_own_target(struct sgx_targetinfo *self);

/* EGETKEY: SGX_SUCCESS and the key, or another status of softsgx_keys.h and `key` as it was. */
int sgx_egetkey(const struct sgx_keyrequest *request, uint8_t key[SGX_KEY_BYTES]);

/* What the entry code returns to the host in RSI. */
enum { SGX__DONE = 0, SGX__BUSY = 1, SGX__POINTER = 2 };

#ifdef __cplusplus
}
#endif
#endif
