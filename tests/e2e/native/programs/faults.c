/*
 * What faults of enclave code, and of ENCLU itself, look like to the program.
 * usage: faults ENCLAVE SCENARIO; exit status 0 says that all is as hardware and Linux have it.
 */
#include "sgx.h"

static int wrong;

/* --- error codes, as the vDSO reports them --------------------------------------------------- */

static void code(const char *what, int op, uint64_t at, unsigned expected)
{
	struct run run;
	uint64_t value;
	int result = call(0, op, at, 1, (uint64_t)&value, &run);
	if (!result && run.function == 3 && run.vector == 14 && run.code == expected && run.address == (at & -PAGE)) return;
	printf("%s: %#lx: result %d function %u vector %u code %#x address %#lx\n", what, at, result, run.function, run.vector, run.code, run.address);
	wrong = 1;
}

static void codes(void)
{
	static const struct { const char *what; int prot, op; unsigned expected; } enclave[] = {
		{"load, PROT_NONE", PROT_NONE, GET, 0x4}, {"store, PROT_NONE", PROT_NONE, PUT, 0x6},
		{"fetch, PROT_NONE", PROT_NONE, RUN, 0x14}, {"store, PROT_READ", PROT_READ, PUT, 0x7},
		{"fetch, no PROT_EXEC", PROT_READ | PROT_WRITE, RUN, 0x15},
	};
	char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (unsigned i = 0; i < sizeof enclave / sizeof *enclave; i++) {
		build();
		put(1, data + 8, 1);
		CHECK(!mprotect((void *)data, PAGE, enclave[i].prot));
		code(enclave[i].what, enclave[i].op, data + 16, enclave[i].expected);
	}
	build();
	uint64_t hole = data + data_pages * PAGE;
	code("load, no mapping", GET, hole, 0x4);
	/* ordinary memory */
	for (unsigned i = 0; i < sizeof enclave / sizeof *enclave; i++) {
		build();
		*page = 1;
		CHECK(!mprotect(page, PAGE, enclave[i].prot));
		code(enclave[i].what, enclave[i].op, (uint64_t)page + 16, enclave[i].expected);
		CHECK(!mprotect(page, PAGE, PROT_READ | PROT_WRITE));
	}
	CHECK(!munmap(page, PAGE));
	build();
	code("store, unmapped", PUT, (uint64_t)page, 0x6);
	/* operands of leaves */
	build();
	put(0, data + PAGE, 0x203);
	CHECK(!mprotect((void *)data, PAGE, PROT_NONE));
	struct run run;
	CHECK(!call(0, EXTEND, data, data + PAGE, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 4 && run.address == data);
}

/* --- signals: information and frame ----------------------------------------------------------- */

static sigjmp_buf back;
static siginfo_t info;
static greg_t regs[NGREG];
static void note(int number, siginfo_t *told, void *context)
{
	info = *told;
	memcpy(regs, ((ucontext_t *)context)->uc_mcontext.gregs, sizeof regs);
	siglongjmp(back, number);
}

struct expected { int number, code, vector; unsigned error; uint64_t address, rip; };
static void frame(const char *what, uint64_t tcs, int op, uint64_t rdi, struct expected e)
{
	uint64_t value;
	int number = sigsetjmp(back, 1);
	if (!number) {
		raw_enter(tcs, rdi, 0, op, (uint64_t)&value);
		printf("%s: no signal\n", what);
		wrong = 1;
		return;
	}
	if (e.rip) { /* at the AEP, and what follows from it */
		if (regs[REG_RIP] != (greg_t)e.rip) number = -1;
		if (e.vector == 0 || e.vector == 6) e.address = e.rip;
	}
	int page_fault = e.vector == 14;
	if (number == e.number && info.si_signo == number && info.si_code == e.code
	    && (uint64_t)info.si_addr == e.address && regs[REG_TRAPNO] == e.vector
	    && (uint64_t)regs[REG_ERR] == e.error && (!page_fault || (uint64_t)regs[REG_CR2] == e.address)) return;
	printf("%s: signal %d code %d address %p trap %lld error %#llx cr2 %#llx rip %#llx, AEP %p\n", what, number, info.si_code,
	       info.si_addr, regs[REG_TRAPNO], regs[REG_ERR], regs[REG_CR2], regs[REG_RIP], raw_aep);
	wrong = 1;
}

static void frames(void)
{
	struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
	int faults[] = {SIGSEGV, SIGILL, SIGBUS, SIGFPE, SIGTRAP};
	char *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t aep = (uint64_t)raw_aep, unmapped = 8 * PAGE;
	for (int i = 0; i < 5; i++) CHECK(!sigaction(faults[i], &action, NULL));
#define EXPECT(what, tcs, op, rdi, ...) (build(), frame(what, tcs, op, rdi, (struct expected){__VA_ARGS__}))
	EXPECT("UD2", base, UD2, 0, SIGILL, ILL_ILLOPN, 6, 0, 0, aep);
	EXPECT("SYSCALL", base, FIRST_ILLEGAL + 1, 0, SIGILL, ILL_ILLOPN, 6, 0, 0, aep);
	EXPECT("IN", base, FIRST_ILLEGAL + 4, 0, SIGILL, ILL_ILLOPN, 6, 0, 0, aep);
	EXPECT("DIV", base, DIV, 0, SIGFPE, FPE_INTDIV, 0, 0, 0, aep);
	EXPECT("not canonical", base, GET, 1ul << 63, SIGSEGV, SI_KERNEL, 13, 0, 0, aep);
	EXPECT("load, unmapped", base, GET, unmapped + 8, SIGSEGV, SEGV_MAPERR, 14, 4, unmapped, aep);
	EXPECT("store, unmapped", base, PUT, unmapped + 8, SIGSEGV, SEGV_MAPERR, 14, 6, unmapped, aep);
	EXPECT("load of the TCS", base, GET, base, SIGSEGV, SEGV_ACCERR, 14, 0x8005, base, aep);
	EXPECT("store to the TCS", base, PUT, base + 8, SIGSEGV, SEGV_ACCERR, 14, 0x8007, base, aep);
	EXPECT("fetch, no PROT_EXEC", base, RUN, data, SIGSEGV, SEGV_ACCERR, 14, 0x15, data, aep);
	EXPECT("EENTER, no TCS", data, NOP, 0, SIGSEGV, SEGV_ACCERR, 14, 0x8005, data);
	EXPECT("EENTER, misaligned", base + 8, NOP, 0, SIGSEGV, SI_KERNEL, 13, 0, 0);
	EXPECT("EENTER, unmapped", unmapped, NOP, 0, SIGSEGV, SEGV_MAPERR, 14, 6, unmapped);
	EXPECT("EENTER, no EPC", (uint64_t)page, NOP, 0, SIGSEGV, SEGV_ACCERR, 14, 0x8005, (uint64_t)page);
	/* code outside, and signals that are blocked or have no handler */
	build();
	put(0, data, 1);
	CHECK(!mprotect((void *)data, PAGE, PROT_READ));
	int number = sigsetjmp(back, 1);
	if (!number) { *(volatile uint64_t *)(data + 16) = 2; CHECK(0); }
	CHECK(number == SIGSEGV && info.si_code == SEGV_ACCERR && (uint64_t)info.si_addr == data + 16);
	CHECK(regs[REG_TRAPNO] == 14 && regs[REG_ERR] == 7 && (uint64_t)regs[REG_CR2] == data + 16);
	pid_t child = fork();
	if (!child) {
		signal(SIGILL, SIG_DFL);
		raw_enter(base, 0, 0, UD2, 0);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGILL);
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	file = argv[1]; enter = find_enter();
	CHECK(enter);
	if (!strcmp(argv[2], "codes")) codes(); else frames();
	return wrong;
}
