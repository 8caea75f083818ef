/*
 * What the programs here have in common: using SGX as small runtimes do, with device, ioctls, mmap,
 * vDSO or raw ENCLU.  They know nothing of softsgx.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096ul
#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s (errno %d)\n", __func__, __LINE__, #x, errno); exit(1); } } while (0)

struct run {
	uint64_t tcs; uint32_t function; uint16_t vector, code; uint64_t address, handler, data;
	uint8_t reserved[216];
};
typedef int enter_t(uint64_t rdi, uint64_t rsi, uint64_t rdx, uint32_t fn, uint64_t r8,
		    uint64_t r9, struct run *run);
/* What the enclave does; see enclave.py. */
enum { NOP, PUT, GET, UD2, DIV, SPIN, ACCEPT, EXTEND, VECTOR, KEEP, REGISTERS, RUN, FIRST_ILLEGAL, LAST_ILLEGAL = FIRST_ILLEGAL + 7,
       RDTSC, RDTSCP, GETBV, SAVE, RESTORE, SWEEP, MASKED, LAST_MASKED = MASKED + 10, LEAVE };

static enter_t *enter;
static __thread enter_t *by; /* in place of it */
static const char *file;
static int device, on_failed_init, where; /* MAP_32BIT, for one */
static void *hint;
static uint64_t base, size, data, data_pages, attributes = 4 /* MODE64BIT */, xfrm = 3;

struct span { uint64_t offset, pages, flags, measured; };

static inline enter_t *find_enter(void)
{
	/* By PT_DYNAMIC and DT_HASH, as small loaders do. */
	const char *vdso = (const char *)getauxval(AT_SYSINFO_EHDR);
	const Elf64_Ehdr *header = (const void *)vdso;
	const Elf64_Phdr *phdr = (const void *)(vdso + header->e_phoff);
	const Elf64_Dyn *dyn = NULL;
	const Elf64_Sym *symbols = NULL;
	const char *strings = NULL;
	const uint32_t *hash = NULL;
	for (int i = 0; i < header->e_phnum; i++)
		if (phdr[i].p_type == PT_DYNAMIC) dyn = (const void *)(vdso + phdr[i].p_offset);
	for (; dyn && dyn->d_tag; dyn++) {
		const char *at = vdso + dyn->d_un.d_ptr;
		if (dyn->d_tag == DT_HASH) hash = (const void *)at;
		if (dyn->d_tag == DT_SYMTAB) symbols = (const void *)at;
		if (dyn->d_tag == DT_STRTAB) strings = at;
	}
	CHECK(hash && symbols && strings);
	for (uint32_t i = 1; i < hash[1]; i++)
		if (!strcmp(strings + symbols[i].st_name, "__vdso_sgx_enter_enclave"))
			return (enter_t *)(vdso + symbols[i].st_value);
	return NULL;
}

static inline void build(void)
{
	uint8_t secs[4096] __attribute__((aligned(4096))) = {0}, info[64] __attribute__((aligned(64)));
	static uint8_t sigstruct[1808] __attribute__((aligned(4096)));
	uint64_t count, tcs_type = 1;
	struct span spans[8];
	FILE *f = fopen(file, "rb");
	CHECK(f && fread(&size, 8, 1, f) == 1 && fread(&count, 8, 1, f) == 1 && count <= 8);
	CHECK(fread(sigstruct, sizeof sigstruct, 1, f) == 1);
	device = open("/dev/sgx_enclave", O_RDWR);
	CHECK(device >= 0);
	char *reserved = mmap(hint, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | where, -1, 0);
	CHECK(reserved != MAP_FAILED);
	base = ((uint64_t)reserved + size - 1) & -size;
	munmap(reserved, base - (uint64_t)reserved);
	munmap((void *)(base + size), (uint64_t)reserved + size - base);
	*(uint64_t *)secs = size; *(uint64_t *)(secs + 8) = base; *(uint32_t *)(secs + 16) = 1;
	*(uint64_t *)(secs + 48) = attributes; *(uint64_t *)(secs + 56) = xfrm;
	uint64_t create = (uint64_t)secs;
	CHECK(!ioctl(device, 0x4008a400, &create));
	for (uint64_t i = 0; i < count; i++) {
		struct span *s = &spans[i];
		CHECK(fread(s, sizeof *s, 1, f) == 1);
		char *bytes = mmap(NULL, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(fread(bytes, PAGE, s->pages, f) == s->pages);
		memset(info, 0, 64);
		*(uint64_t *)info = s->flags;
		uint64_t add[6] = {(uint64_t)bytes, s->offset, s->pages * PAGE, (uint64_t)info, s->measured, 0};
		while (add[2]) { /* a signal may end it early */
			CHECK(!ioctl(device, 0xc030a401, add) || errno == EINTR);
			add[0] += add[5]; add[1] += add[5]; add[2] -= add[5]; add[5] = 0;
		}
		munmap(bytes, s->pages * PAGE);
		int prot = (s->flags >> 8 & 0xff) == tcs_type ? 3 : s->flags & 7;
		CHECK(mmap((void *)(base + s->offset), s->pages * PAGE, prot, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
		data = base + s->offset; data_pages = s->pages; /* the last span */
	}
	uint64_t init = (uint64_t)sigstruct;
	int failed = ioctl(device, 0x4008a402, &init);
	if (on_failed_init && failed) { /* it can be repeated */
		CHECK(errno == on_failed_init && !ioctl(device, 0x4008a402, &init));
		_exit(0);
	}
	CHECK(!failed);
	fclose(f);
}

/* Not inlined: an enclave that is resumed exits with the stack it was entered with. */
__attribute__((noinline)) static int go(int thread, int function, uint64_t op, uint64_t rdi,
					uint64_t rsi, uint64_t r8, struct run *run)
{
	memset(run, 0, sizeof *run);
	run->tcs = base + thread * PAGE;
	int result = (by ? by : enter)(rdi, rsi, op, function, r8, 0, run);
	/* An asynchronous exit leaves zeros in these, for the vDSO's caller to mind. */
	__asm__ volatile("" : : : "rbx", "r12", "r13", "r14", "r15");
	return result;
}
#define call(thread, op, rdi, rsi, r8, run) go(thread, 2, op, rdi, rsi, r8, run)

static inline void put(int thread, uint64_t at, uint64_t value)
{
	struct run run;
	int ret = call(thread, PUT, at, value, 0, &run);
	if (ret || run.function != 4) fprintf(stderr, "thread %d: result %d function %u vector %u code %x address %lx\n", thread, ret, run.function, run.vector, run.code, run.address);
	CHECK(!ret && run.function == 4);
}

static inline uint64_t get(int thread, uint64_t at)
{
	struct run run;
	uint64_t value = 0;
	CHECK(!call(thread, GET, at, 0, (uint64_t)&value, &run) && run.function == 4);
	return value;
}

/* Raw ENCLU: EENTER at one place, the asynchronous exit pointer at another. */
extern char raw_aep[];
uint64_t raw_enter(uint64_t tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx, uint64_t r8);
__asm__(".text\nraw_enter:\n push %rbp\n mov %rsp,%rbp\n push %rbx\n push %r12\n"
	" mov %rdi,%rbx\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n"
	" lea raw_aep(%rip),%rcx\n mov $2,%eax\n .byte 0x0f,0x01,0xd7\n jmp 1f\n"
	".globl raw_aep\nraw_aep:\n .byte 0x0f,0x01,0xd7\n"
	"1: lea -16(%rbp),%rsp\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
