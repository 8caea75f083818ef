/* The outside: load an enclave that `softsgx build` made, and call it.  Linux, x86-64, one header.
 *
 *     #include <softsgx_host.h>
 *
 *     struct sgx_enclave enclave;
 *     long result;
 *
 *     if (sgx_load(&enclave, "enclave.sgxs"))
 *         return fprintf(stderr, "%s\n", enclave.problem), 1;
 *     if (sgx_call(&enclave, 0, 7, data, size, &result))
 *         return fprintf(stderr, "%s\n", enclave.problem), 1;
 *     sgx_unload(&enclave);
 *
 * Only the kernel's own interface is used: /dev/sgx_enclave and __vdso_sgx_enter_enclave, so the
 * same program runs on SGX hardware (with flexible launch control) and under `softsgx run`.
 *
 * Source:
 *     Linux, Documentation/arch/x86/sgx.rst; uapi/asm/sgx.h; SGXS stream format.
 */
#ifndef SOFTSGX_HOST_H
#define SOFTSGX_HOST_H

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SGX_MAX_THREADS 64
#define SGX_PAGE 4096u

/* struct sgx_enclave_run: what __vdso_sgx_enter_enclave reads and writes. */
struct sgx_run {
    uint64_t tcs;
    uint32_t function;
    uint16_t exception_vector;
    uint16_t exception_error_code;
    uint64_t exception_addr;
    uint64_t user_handler;
    uint64_t user_data;
    uint8_t reserved[216];
};

struct sgx_enclave {
    int fd;
    unsigned threads;                     /* how many TCS it has */
    uint64_t base, size;
    uint64_t tcs[SGX_MAX_THREADS];
    struct sgx_run run[SGX_MAX_THREADS];  /* of the last call of each thread */
    void *enter;                          /* __vdso_sgx_enter_enclave */
    char problem[256];                    /* what failed last, in one line */
};

/* Build the enclave in `path` (.sgxs) with the SIGSTRUCT beside it (.sig).  0, or -1 and
 * `problem`. */
static int sgx_load(struct sgx_enclave *enclave, const char *path);

/* Call ecall(function, argument, size) on a thread that no other call is using.  0 and what it
 * returned; or -1, `problem` and errno: EFAULT after an exception inside (run[thread] has vector,
 * error code and page; the thread is lost), EBUSY on a thread that was lost, EINVAL. */
static int sgx_call(struct sgx_enclave *enclave, unsigned thread, unsigned long function,
                    void *argument, size_t size, long *result);

/* Unmap and close it: its pages are gone. */
static void sgx_unload(struct sgx_enclave *enclave);

/* ------------------------------------------------------------------------------------------- */

struct sgx__create { uint64_t src; };
struct sgx__add_pages { uint64_t src, offset, length, secinfo, flags, count; };
struct sgx__init { uint64_t sigstruct; };

#define SGX__CREATE _IOW(0xA4, 0x00, struct sgx__create)
#define SGX__ADD_PAGES _IOWR(0xA4, 0x01, struct sgx__add_pages)
#define SGX__INIT _IOW(0xA4, 0x02, struct sgx__init)

enum { SGX__EENTER = 2, SGX__EEXIT = 4, SGX__MEASURE = 1, SGX__TYPE_TCS = 0x100 };
enum { SGX__RECORD = 64, SGX__CHUNK = 256, SGX__SIGSTRUCT = 1808, SGX__RUN_PAGES = 256 };

/* Pages that follow each other and are added alike. */
struct sgx__pages {
    uint64_t offset, flags, count;
    int measured;
    unsigned char *data; /* SGX__RUN_PAGES pages */
};

/* Say in `problem` what went wrong; -1. */
static __attribute__((format(printf, 2, 3))) int sgx__fail(struct sgx_enclave *enclave,
                                                           const char *format, ...)
{
    va_list rest;

    va_start(rest, format);
    vsnprintf(enclave->problem, sizeof(enclave->problem), format, rest);
    va_end(rest);
    return -1;
}

static unsigned char *sgx__read_file(struct sgx_enclave *enclave, const char *path, size_t *size)
{
    struct stat status;
    unsigned char *data = NULL;
    size_t have = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &status)) {
        sgx__fail(enclave, "%s: %s", path, strerror(errno));
    } else if (!(data = (unsigned char *)malloc((size_t)status.st_size + 1))) {
        sgx__fail(enclave, "%s: no memory for %lld bytes", path, (long long)status.st_size);
    } else {
        while (have < (size_t)status.st_size) {
            ssize_t got = read(fd, data + have, (size_t)status.st_size - have);
            if (got <= 0)
                break;
            have += (size_t)got;
        }
        *size = have;
    }
    if (fd >= 0)
        close(fd);
    return data;
}

static uint64_t sgx__u64(const unsigned char *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

/* --- the vDSO ------------------------------------------------------------------------------- */

/* The number of symbols: the hash tables know, the symbol table does not. */
static uint32_t sgx__symbols(const uint32_t *hash, const uint32_t *gnu)
{
    if (hash)
        return hash[1];
    if (!gnu)
        return 0;
    uint32_t buckets = gnu[0], first = gnu[1], last = 0;
    const uint32_t *bucket = gnu + 4 + 2 * gnu[2], *chain = bucket + buckets;
    for (uint32_t i = 0; i < buckets; i++)
        if (bucket[i] > last)
            last = bucket[i];
    if (last < first)
        return first;
    while (!(chain[last - first] & 1))
        last++;
    return last + 1;
}

static void *sgx__vdso_symbol(const char *name)
{
    const unsigned char *image = (const unsigned char *)getauxval(AT_SYSINFO_EHDR);
    const Elf64_Dyn *dynamic = NULL;
    const Elf64_Sym *symbols = NULL;
    const char *names = NULL;
    const uint32_t *hash = NULL, *gnu = NULL;
    uint64_t slide = 0;
    int loaded = 0;

    if (!image)
        return NULL;
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    const Elf64_Phdr *segment = (const Elf64_Phdr *)(image + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++) {
        if (segment[i].p_type == PT_LOAD && !loaded) {
            slide = (uint64_t)image + segment[i].p_offset - segment[i].p_vaddr;
            loaded = 1;
        } else if (segment[i].p_type == PT_DYNAMIC) {
            dynamic = (const Elf64_Dyn *)(image + segment[i].p_offset);
        }
    }
    if (!loaded || !dynamic)
        return NULL;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        const void *at = (const void *)(slide + dynamic->d_un.d_ptr);
        if (dynamic->d_tag == DT_SYMTAB)
            symbols = (const Elf64_Sym *)at;
        else if (dynamic->d_tag == DT_STRTAB)
            names = (const char *)at;
        else if (dynamic->d_tag == DT_HASH)
            hash = (const uint32_t *)at;
        else if (dynamic->d_tag == DT_GNU_HASH)
            gnu = (const uint32_t *)at;
    }
    if (!symbols || !names)
        return NULL;
    for (uint32_t i = 1; i < sgx__symbols(hash, gnu); i++)
        if (symbols[i].st_shndx != SHN_UNDEF && !strcmp(names + symbols[i].st_name, name))
            return (void *)(slide + symbols[i].st_value);
    return NULL;
}

/* --- loading -------------------------------------------------------------------------------- */

/* Add one run of pages; the kernel may stop early, for a signal, and says how far it came. */
static int sgx__add(struct sgx_enclave *enclave, struct sgx__pages *run)
{
    unsigned char secinfo[64] __attribute__((aligned(64))) = {0};
    struct sgx__add_pages request;
    uint64_t done = 0, length = run->count * SGX_PAGE;

    memcpy(secinfo, &run->flags, sizeof(run->flags));
    while (done < length) {
        memset(&request, 0, sizeof(request));
        request.src = (uint64_t)run->data + done;
        request.offset = run->offset + done;
        request.length = length - done;
        request.secinfo = (uint64_t)secinfo;
        request.flags = run->measured ? SGX__MEASURE : 0;
        if (ioctl(enclave->fd, SGX__ADD_PAGES, &request) && errno != EINTR)
            return sgx__fail(enclave, "adding pages at 0x%llx: %s",
                             (unsigned long long)(run->offset + done), strerror(errno));
        done += request.count;
    }
    run->count = 0;
    return 0;
}

static int sgx__create_enclave(struct sgx_enclave *enclave, const unsigned char *first,
                               const unsigned char *sigstruct)
{
    unsigned char secs[SGX_PAGE] __attribute__((aligned(4096))) = {0};
    struct sgx__create request = {(uint64_t)secs};
    unsigned char *area;
    uint64_t head;

    memcpy(&enclave->size, first + 12, 8);
    /* An enclave is aligned to its size: take twice as much, give back what is too much. */
    area = (unsigned char *)mmap(NULL, 2 * enclave->size, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return sgx__fail(enclave, "reserving 2 x 0x%llx bytes: %s",
                         (unsigned long long)enclave->size, strerror(errno));
    enclave->base = ((uint64_t)area + enclave->size - 1) & -enclave->size;
    head = enclave->base - (uint64_t)area;
    if (head)
        munmap(area, head);
    munmap((void *)(enclave->base + enclave->size), enclave->size - head);

    memcpy(secs, &enclave->size, 8);
    memcpy(secs + 8, &enclave->base, 8);
    memcpy(secs + 16, first + 8, 4);        /* SSAFRAMESIZE */
    memcpy(secs + 20, sigstruct + 900, 4);  /* MISCSELECT */
    memcpy(secs + 48, sigstruct + 928, 16); /* ATTRIBUTES and XFRM */
    if (ioctl(enclave->fd, SGX__CREATE, &request))
        return sgx__fail(enclave, "creating the enclave: %s", strerror(errno));
    return 0;
}

/* Read one page's records at `at`; return where the next page's begin, 0 when they are no SGXS. */
static size_t sgx__page(const unsigned char *stream, size_t size, size_t at, uint64_t offset,
                        unsigned char *page, int *chunks, int *measured)
{
    *chunks = *measured = 0;
    for (at += SGX__RECORD; at + SGX__RECORD <= size; at += SGX__RECORD + SGX__CHUNK) {
        const unsigned char *record = stream + at;
        int extend = !memcmp(record, "EEXTEND", 8);

        if (!extend && memcmp(record, "UNMEASRD", 8))
            return memcmp(record, "EADD\0\0\0\0", 8) ? 0 : at;
        uint64_t where = sgx__u64(record + 8) - offset;
        if (where > SGX_PAGE - SGX__CHUNK || at + SGX__RECORD + SGX__CHUNK > size)
            return 0;
        memcpy(page + where, record + SGX__RECORD, SGX__CHUNK);
        *chunks += 1;
        *measured += extend;
    }
    return at == size ? at : 0;
}

/* Add every page of the stream; with `map`, only map what was added. */
static int sgx__walk(struct sgx_enclave *enclave, const char *path, const unsigned char *stream,
                     size_t size, struct sgx__pages *run, int map)
{
    size_t at = SGX__RECORD;

    memset(run->data, 0, SGX__RUN_PAGES * (size_t)SGX_PAGE);
    run->count = 0;
    enclave->threads = 0;
    while (at <= size) {
        uint64_t offset = 0, flags = 0, limit = map ? UINT64_MAX : SGX__RUN_PAGES;
        unsigned char page[SGX_PAGE] = {0};
        int chunks = 0, measured = 0, last = at == size;

        if (!last) {
            offset = sgx__u64(stream + at + 8);
            flags = sgx__u64(stream + at + 16);
            at = sgx__page(stream, size, at, offset, page, &chunks, &measured);
            if (!at || (measured && measured != (int)(SGX_PAGE / SGX__CHUNK)))
                return sgx__fail(enclave, "%s: page 0x%llx: no SGXS that Linux can load", path,
                                 (unsigned long long)offset);
            if (flags == SGX__TYPE_TCS && enclave->threads < SGX_MAX_THREADS)
                enclave->tcs[enclave->threads++] = enclave->base + offset;
        }
        if (run->count && (last || run->count == limit || flags != run->flags ||
                           offset != run->offset + run->count * SGX_PAGE ||
                           (!map && !!measured != run->measured))) {
            int prot = run->flags & SGX__TYPE_TCS ? PROT_READ | PROT_WRITE : run->flags & 7;
            if (!map) {
                uint64_t used = run->count;
                if (sgx__add(enclave, run))
                    return -1;
                memset(run->data, 0, used * SGX_PAGE);
            } else if (mmap((void *)(enclave->base + run->offset), run->count * SGX_PAGE, prot,
                            MAP_SHARED | MAP_FIXED, enclave->fd, 0) == MAP_FAILED) {
                return sgx__fail(enclave, "mapping 0x%llx: %s", (unsigned long long)run->offset,
                                 strerror(errno));
            }
            run->count = 0;
        }
        if (last)
            return 0;
        if (!run->count) {
            run->offset = offset;
            run->flags = flags;
            run->measured = !!measured;
        }
        if (!map && chunks)
            memcpy(run->data + run->count * SGX_PAGE, page, SGX_PAGE);
        run->count++;
    }
    return sgx__fail(enclave, "%s: cut short", path);
}

static int sgx__build(struct sgx_enclave *enclave, const char *path, const unsigned char *stream,
                      size_t size, const unsigned char *sigstruct)
{
    struct sgx__init request = {(uint64_t)sigstruct};
    struct sgx__pages run = {0, 0, 0, 0, NULL};
    int status = -1;

    if (size < SGX__RECORD || memcmp(stream, "ECREATE", 8))
        return sgx__fail(enclave, "%s: no SGXS stream; make one with softsgx build", path);
    enclave->enter = sgx__vdso_symbol("__vdso_sgx_enter_enclave");
    enclave->fd = open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC);
    if (enclave->fd < 0 || !enclave->enter)
        return sgx__fail(enclave, "no SGX here (%s); run this program with: softsgx run -- ...",
                         enclave->fd < 0 ? "/dev/sgx_enclave cannot be opened"
                                         : "no __vdso_sgx_enter_enclave");
    run.data = (unsigned char *)aligned_alloc(SGX_PAGE, SGX__RUN_PAGES * (size_t)SGX_PAGE);
    if (!run.data)
        return sgx__fail(enclave, "%s: no memory", path);
    if (!sgx__create_enclave(enclave, stream, sigstruct) &&
        !sgx__walk(enclave, path, stream, size, &run, 0)) {
        if (ioctl(enclave->fd, SGX__INIT, &request))
            sgx__fail(enclave, "%s: the enclave was not initialised: %s", path, strerror(errno));
        else
            status = sgx__walk(enclave, path, stream, size, &run, 1);
    }
    free(run.data);
    return status;
}

static __attribute__((unused)) int sgx_load(struct sgx_enclave *enclave, const char *path)
{
    unsigned char sigstruct[SGX_PAGE] __attribute__((aligned(4096))) = {0};
    unsigned char *stream, *signature = NULL;
    char beside[4096];
    size_t size = 0, signature_size = 0;
    const char *dot = strrchr(path, '.');
    int status = -1;

    memset(enclave, 0, sizeof(*enclave));
    enclave->fd = -1;
    snprintf(beside, sizeof(beside), "%.*s.sig", dot ? (int)(dot - path) : (int)strlen(path), path);
    stream = sgx__read_file(enclave, path, &size);
    if (stream)
        signature = sgx__read_file(enclave, beside, &signature_size);
    if (signature && signature_size != SGX__SIGSTRUCT) {
        sgx__fail(enclave, "%.200s: %zu bytes; a SIGSTRUCT has 1808", beside, signature_size);
    } else if (signature) {
        memcpy(sigstruct, signature, signature_size);
        status = sgx__build(enclave, path, stream, size, sigstruct);
    }
    free(stream);
    free(signature);
    if (status)
        sgx_unload(enclave);
    return status;
}

static __attribute__((unused)) void sgx_unload(struct sgx_enclave *enclave)
{
    if (enclave->base)
        munmap((void *)enclave->base, enclave->size);
    if (enclave->fd >= 0)
        close(enclave->fd);
    enclave->base = 0;
    enclave->fd = -1;
}

/* --- calling -------------------------------------------------------------------------------- */

/* Call the vDSO as C calls a function.  After an exception its registers are not the caller's: the
 * processor has cleared R8 to R15, so all that the ABI promises to keep is kept here. */
static __attribute__((naked, noinline, used)) int
sgx__enter(void *enter, uint64_t rdi, uint64_t rsi, uint64_t rdx, unsigned function,
           struct sgx_run *run)
{
    __asm__("pushq %rbp\n\t"
            "movq  %rsp, %rbp\n\t"
            "pushq %rbx\n\t"
            "pushq %r12\n\t"
            "pushq %r13\n\t"
            "pushq %r14\n\t"
            "pushq %r15\n\t"
            "pushq %r9\n\t" /* the seventh argument */
            "movq  %rdi, %rax\n\t"
            "movq  %rsi, %rdi\n\t"
            "movq  %rdx, %rsi\n\t"
            "movq  %rcx, %rdx\n\t"
            "movl  %r8d, %ecx\n\t"
            "call  *%rax\n\t"
            "leaq  -40(%rbp), %rsp\n\t"
            "popq  %r15\n\t"
            "popq  %r14\n\t"
            "popq  %r13\n\t"
            "popq  %r12\n\t"
            "popq  %rbx\n\t"
            "popq  %rbp\n\t"
            "ret");
}

struct sgx__answer {
    long result, status;
};

/* The vDSO calls this after the enclave has left, with its RDI and RSI, which only a handler learns. */
static int sgx__handler(long rdi, long rsi, long rdx, long rsp, long r8, long r9,
                        struct sgx_run *run)
{
    struct sgx__answer *answer = (struct sgx__answer *)run->user_data;

    (void)rdx, (void)rsp, (void)r8, (void)r9;
    answer->result = rdi;
    answer->status = rsi;
    return 0;
}

static __attribute__((unused)) int sgx_call(struct sgx_enclave *enclave, unsigned thread,
                                            unsigned long function, void *argument, size_t size,
                                            long *result)
{
    struct sgx__answer answer = {0, 0};
    struct sgx_run *run;
    int status;

    if (result)
        *result = 0;
    if (thread >= enclave->threads) {
        errno = EINVAL;
        return sgx__fail(enclave, "thread %u of %u", thread, enclave->threads);
    }
    run = &enclave->run[thread];
    memset(run, 0, sizeof(*run));
    run->tcs = enclave->tcs[thread];
    run->user_handler = (uint64_t)sgx__handler;
    run->user_data = (uint64_t)&answer;
    status = sgx__enter(enclave->enter, function, (uint64_t)argument, size, SGX__EENTER, run);
    run->user_data = 0;
    if (status < 0) {
        errno = -status;
        return sgx__fail(enclave, "entering the enclave: %s", strerror(errno));
    }
    if (run->function != SGX__EEXIT) {
        errno = EFAULT;
        return sgx__fail(enclave, "exception %u, error code 0x%x, address 0x%llx %s",
                         run->exception_vector, run->exception_error_code,
                         (unsigned long long)run->exception_addr,
                         run->function == SGX__EENTER ? "on entering" : "inside the enclave");
    }
    if (answer.status) {
        errno = answer.status == 1 ? EBUSY : EINVAL;
        return sgx__fail(enclave, "%s", answer.status == 1
                                            ? "the thread was lost in an exception"
                                            : "the argument is not all outside the enclave");
    }
    if (result)
        *result = answer.result;
    return 0;
}

#endif
