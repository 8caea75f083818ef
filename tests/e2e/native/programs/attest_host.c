/* Does what it is told by lines on standard input, and answers each with one line:
 *
 *     load PATH                 ok NUMBER, BASE, SIZE and TCS of the enclave
 *     call NUMBER FUNCTION HEX  ok RESULT HEX, or: exception VECTOR CODE ADDRESS
 *     unload NUMBER             ok
 */

#include <softsgx_host.h>

#include "attest.h"

enum { ENCLAVES = 16 };

static struct sgx_enclave enclaves[ENCLAVES];
static char line[8192], word[8192];

static void call(unsigned number, unsigned long function)
{
    struct sgx_enclave *enclave = &enclaves[number];
    struct attest asked;
    uint8_t *bytes = (uint8_t *)&asked;
    long result;

    for (size_t i = 0; i < sizeof(asked); i++)
        sscanf(word + 2 * i, "%2hhx", &bytes[i]);
    if (sgx_call(enclave, 0, function, &asked, sizeof(asked), &result) == 0) {
        printf("ok %ld ", result);
        for (size_t i = 0; i < sizeof(asked); i++)
            printf("%02x", bytes[i]);
        puts("");
    } else if (errno == EFAULT) {
        printf("exception %u %u %llu\n", enclave->run[0].exception_vector,
               enclave->run[0].exception_error_code,
               (unsigned long long)enclave->run[0].exception_addr);
    } else {
        printf("failed %s\n", enclave->problem);
    }
}

static void load(void)
{
    unsigned number = 0;

    while (number < ENCLAVES && enclaves[number].base)
        number++;
    if (number == ENCLAVES) {
        puts("failed too many");
    } else if (sgx_load(&enclaves[number], word)) {
        printf("failed %s\n", enclaves[number].problem);
    } else {
        printf("ok %u %llu %llu %llu\n", number, (unsigned long long)enclaves[number].base,
               (unsigned long long)enclaves[number].size,
               (unsigned long long)enclaves[number].tcs[0]);
    }
}

int main(void)
{
    unsigned number;
    unsigned long function;

    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof(line), stdin)) {
        if (sscanf(line, "load %s", word) == 1) {
            load();
        } else if (sscanf(line, "call %u %lu %s", &number, &function, word) == 3) {
            call(number % ENCLAVES, function);
        } else if (sscanf(line, "unload %u", &number) == 1) {
            sgx_unload(&enclaves[number % ENCLAVES]);
            puts("ok");
        } else {
            puts("failed not understood");
        }
    }
    return 0;
}
