/* EREPORT and EGETKEY: what an enclave can say of itself, and the keys that only it gets.
 *
 * Source:
 *     SDM vol. 3D, "EREPORT", "EGETKEY": registers and alignment.
 */

#include <softsgx.h>

#define EREPORT 0
#define EGETKEY 1

_Static_assert(sizeof(struct sgx_targetinfo) == 512, "TARGETINFO");
_Static_assert(offsetof(struct sgx_targetinfo, config_id) == 64, "TARGETINFO");
_Static_assert(sizeof(struct sgx_report) == 432, "REPORT");
_Static_assert(offsetof(struct sgx_report, config_id) == 192, "REPORT");
_Static_assert(offsetof(struct sgx_report, report_data) == 320, "REPORT");
_Static_assert(offsetof(struct sgx_report, key_id) == SGX_REPORT_MACED_BYTES, "REPORT");
_Static_assert(sizeof(struct sgx_keyrequest) == 512, "KEYREQUEST");
_Static_assert(offsetof(struct sgx_keyrequest, key_id) == 40, "KEYREQUEST");
_Static_assert(offsetof(struct sgx_keyrequest, config_svn) == 76, "KEYREQUEST");

/* A leaf that reports no code leaves RAX as it was. */
static int enclu(long leaf, const void *rbx, const void *rcx, void *rdx)
{
    /* ENCLU: assemblers know it by different names, or not at all. */
    __asm__ volatile(".byte 0x0f, 0x01, 0xd7"
                     : "+a"(leaf)
                     : "b"(rbx), "c"(rcx), "d"(rdx)
                     : "cc", "memory");
    return (int)leaf;
}

void sgx_ereport(const struct sgx_targetinfo *target, const void *data, struct sgx_report *report)
{
    struct sgx_targetinfo whom __attribute__((aligned(512)));
    uint8_t said[SGX_REPORT_DATA_BYTES] __attribute__((aligned(128)));
    struct sgx_report made __attribute__((aligned(512)));

    memset(&whom, 0, sizeof(whom));
    memset(said, 0, sizeof(said));
    if (target)
        memcpy(&whom, target, sizeof(whom));
    if (data)
        memcpy(said, data, sizeof(said));
    enclu(EREPORT, &whom, said, &made);
    memcpy(report, &made, sizeof(made));
}

void sgx_own_target(struct sgx_targetinfo *self)
{
    struct sgx_report report;

    sgx_ereport(NULL, NULL, &report);
    memset(self, 0, sizeof(*self));
    memcpy(self->measurement, report.mrenclave, sizeof(self->measurement));
    self->attributes = report.attributes;
    self->cet_attributes = report.cet_attributes;
    self->config_svn = report.config_svn;
    self->miscselect = report.miscselect;
    memcpy(self->config_id, report.config_id, sizeof(self->config_id));
}

int sgx_egetkey(const struct sgx_keyrequest *request, uint8_t key[SGX_KEY_BYTES])
{
    struct sgx_keyrequest asked __attribute__((aligned(512)));
    uint8_t got[SGX_KEY_BYTES] __attribute__((aligned(16)));

    memcpy(&asked, request, sizeof(asked));
    int status = enclu(EGETKEY, &asked, got, NULL);
    if (status == SGX_SUCCESS) {
        memcpy(key, got, sizeof(got));
        memset(got, 0, sizeof(got)); /* the stack keeps what is left on it */
        __asm__ volatile("" : : "r"(got) : "memory"); /* nor may this seem to be of no use */
    }
    return status;
}
