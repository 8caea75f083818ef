/* What attest_host.c and attest_enclave.c agree on, and the test with both. */
#include <stdint.h>

enum { REPORT, KEY, SEAL, TARGET, AREAS, RAW };

/* Numbers first, so that the test can pack it by hand. */
struct attest {
    uint64_t leaf, rbx, rcx, rdx; /* RAW */
    uint64_t policy;              /* SEAL */
    uint8_t in[512];              /* TARGETINFO or KEYREQUEST; SEAL: KEYID */
    uint8_t data[64];             /* REPORTDATA */
    uint8_t out[512];             /* REPORT, key, TARGETINFO, addresses */
};
