/* What EREPORT and EGETKEY read and write.  softsgx.h includes this; a host program that passes
 * reports on, or takes them apart, may include it as well.
 *
 * Fill a structure with zeros before you set fields: reserved bytes that are not zero are #GP.
 *
 * Source:
 *     SDM vol. 3D, "EREPORT", "EGETKEY", "Key Request (KEYREQUEST)", "Report (REPORT)",
 *     "Report Target Info (TARGETINFO)".
 */
#ifndef SOFTSGX_KEYS_H
#define SOFTSGX_KEYS_H

#include <stdint.h>

enum { SGX_REPORT_DATA_BYTES = 64, SGX_KEY_BYTES = 16, SGX_REPORT_MACED_BYTES = 384 };

/* What EGETKEY returns.  The key is written with SGX_SUCCESS only. */
enum {
    SGX_SUCCESS = 0,
    SGX_INVALID_ATTRIBUTE = 2, /* the enclave may not have this key */
    SGX_INVALID_CPUSVN = 32,   /* of a later processor than this one */
    SGX_INVALID_ISVSVN = 64,   /* of a later version than the enclave, or its configuration */
    SGX_INVALID_KEYNAME = 256
};

/* ATTRIBUTES.FLAGS. */
enum {
    SGX_FLAGS_INIT = 1,
    SGX_FLAGS_DEBUG = 2,
    SGX_FLAGS_MODE64BIT = 4,
    SGX_FLAGS_PROVISIONKEY = 0x10,
    SGX_FLAGS_EINITTOKENKEY = 0x20,
    SGX_FLAGS_KSS = 0x80
};

/* KEYREQUEST.KEYNAME. */
enum {
    SGX_KEY_EINITTOKEN = 0,
    SGX_KEY_PROVISION = 1,
    SGX_KEY_PROVISION_SEAL = 2,
    SGX_KEY_REPORT = 3,
    SGX_KEY_SEAL = 4
};

/* KEYREQUEST.KEYPOLICY; all but the first two need ATTRIBUTES.KSS. */
enum {
    SGX_POLICY_MRENCLAVE = 1,
    SGX_POLICY_MRSIGNER = 2,
    SGX_POLICY_NOISVPRODID = 4,
    SGX_POLICY_CONFIGID = 8,
    SGX_POLICY_ISVFAMILYID = 0x10,
    SGX_POLICY_ISVEXTPRODID = 0x20
};

struct sgx_attributes {
    uint64_t flags, xfrm;
};

/* Whom a report is for. */
struct sgx_targetinfo {
    uint8_t measurement[32]; /* its MRENCLAVE */
    struct sgx_attributes attributes;
    uint8_t cet_attributes;
    uint8_t reserved1;
    uint16_t config_svn;
    uint32_t miscselect;
    uint8_t reserved2[8];
    uint8_t config_id[64];
    uint8_t reserved3[384];
};

/* What an enclave says of itself to another on the same machine. */
struct sgx_report {
    uint8_t cpusvn[16];
    uint32_t miscselect;
    uint8_t cet_attributes;
    uint8_t reserved1[11];
    uint8_t isv_ext_prod_id[16];
    struct sgx_attributes attributes;
    uint8_t mrenclave[32];
    uint8_t reserved2[32];
    uint8_t mrsigner[32];
    uint8_t reserved3[32];
    uint8_t config_id[64];
    uint16_t isv_prod_id, isv_svn, config_svn;
    uint8_t reserved4[42];
    uint8_t isv_family_id[16];
    uint8_t report_data[SGX_REPORT_DATA_BYTES];
    uint8_t key_id[32]; /* KEYREQUEST.KEYID of the key that made `mac` */
    uint8_t mac[16];    /* AES-128-CMAC of the first SGX_REPORT_MACED_BYTES */
};

/* Which key EGETKEY derives. */
struct sgx_keyrequest {
    uint16_t key_name, key_policy;
    uint16_t isv_svn; /* at most the enclave's own */
    uint8_t cet_attributes_mask;
    uint8_t reserved1;
    uint8_t cpusvn[16];                   /* at most the processor's: REPORT tells */
    struct sgx_attributes attribute_mask; /* what the key depends on beside INIT and DEBUG */
    uint8_t key_id[32];
    uint32_t misc_mask;
    uint16_t config_svn;
    uint8_t reserved2[434];
};

#endif
