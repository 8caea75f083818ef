/*
 * A program whose signal handlers enter the enclave again and mend the frame, as library OSs do.
 * usage: handlers ENCLAVE SCENARIO INSTRUCTION TIMES; exit status 0 says that hardware would have done the same.
 */
#include "sgx.h"

#define GPR_RIP (base + 2 * PAGE + PAGE - 184 + 136) /* of thread 0's first frame */
#define RESTRICT 0xc028a405

/* As raw_enter(), but ERESUME is not the instruction at the asynchronous exit pointer. */
extern char late_aep[];
uint64_t late_enter(uint64_t tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx, uint64_t r8);
__asm__(".text\nlate_enter:\n push %rbp\n mov %rsp,%rbp\n push %rbx\n push %r12\n"
	" mov %rdi,%rbx\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n"
	" lea late_aep(%rip),%rcx\n mov $2,%eax\n .byte 0x0f,0x01,0xd7\n jmp 1f\n"
	".globl late_aep\nlate_aep:\n nop\n .byte 0x0f,0x01,0xd7\n"
	"1: lea -16(%rbp),%rsp\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

/* What the enclave does: #UD by an instruction of two bytes, then exit. */
static const struct { const char *name; int operation; } operations[] = {
	{"ud2", VECTOR}, {"cpuid", FIRST_ILLEGAL}, {"syscall", FIRST_ILLEGAL + 1},
};
static int operation, looking;
static uint64_t times;
static volatile uint64_t handled, stop;

static uint64_t peek(uint64_t at)
{
	uint64_t value = 0;
	late_enter(base, at, 0, GET, (uint64_t)&value);
	return value;
}

/* #UD of an instruction of two bytes: behind it. */
static void skip(int number, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	CHECK(number == SIGILL && info->si_code > 0);
	CHECK(uc->uc_mcontext.gregs[REG_RIP] == (uint64_t)late_aep);
	CHECK(uc->uc_mcontext.gregs[REG_RAX] == 3 && uc->uc_mcontext.gregs[REG_RBX] == base);
	handled++;
	late_enter(base, GPR_RIP, peek(GPR_RIP) + 2, PUT, 0);
}

/* As skip(), but it looks at the instruction first, as emulators of CPUID do. */
static void look(int number, siginfo_t *info, void *context)
{
	CHECK((peek(peek(GPR_RIP)) & 0xffff) == 0xa20f);
	skip(number, info, context);
}

static void catch(int flags)
{
	struct sigaction action = {.sa_sigaction = looking ? look : skip, .sa_flags = SA_SIGINFO | flags};
	CHECK(!sigaction(SIGILL, &action, NULL) && !sigaction(SIGSEGV, &action, NULL));
}

/* Each call ends with a tracking cycle: interrupts for the threads inside. */
static void *disturb(void *unused)
{
	for (uint64_t i = 0; !stop; i++) {
		uint64_t request[5] = {data + (1 + i % 2) * PAGE - base, PAGE, i % 4 < 2 ? 3 : 1, 0, 0};
		CHECK(!ioctl(device, RESTRICT, request) && request[4] == PAGE);
	}
	return unused;
}

/* An exception and an interrupt at once: the exception is seen, once, and with nothing lost. */
static void kicked(void)
{
	pthread_t other;
	uint64_t back;
	build();
	catch(SA_NODEFER);
	CHECK(!pthread_create(&other, NULL, disturb, NULL));
	for (uint64_t i = 0; i < times; i++) late_enter(base, 0, SYS_getppid, operation, (uint64_t)&back);
	stop = 1;
	pthread_join(other, NULL);
	CHECK(handled == times);
}

/* The code of an enclave is its own when a handler looks, and CPUID is #UD each time. */
static void bytes(void)
{
	uint64_t back;
	if (!base) build();
	looking = 1;
	catch(SA_NODEFER);
	for (uint64_t i = 0; i < times; i++) {
		late_enter(base, 0, 7, operation, (uint64_t)&back);
		for (uint64_t page = 3; page < data_pages; page++) late_enter(base, data + page * PAGE, i, PUT, 0);
	}
	CHECK(handled == times);
}

/* The same while other threads go in and out, and pages. */
static void *enter_and_leave(void *unused)
{
	struct run run;
	while (!stop) CHECK(!call(1, NOP, 0, 0, 0, &run) && run.function == 4);
	return unused;
}

static void shared_bytes(void)
{
	pthread_t other;
	build();
	CHECK(!pthread_create(&other, NULL, enter_and_leave, NULL));
	bytes();
	stop = 1;
	pthread_join(other, NULL);
}

/* Handlers without SA_NODEFER, which are entered again and again. */
static void deferred(void)
{
	struct sigaction action;
	sigset_t set;
	uint64_t back;
	build();
	catch(0);
	for (uint64_t i = 0; i < times; i++) late_enter(base, 0, SYS_getppid, operation, (uint64_t)&back);
	CHECK(handled == times);
	CHECK(!sigaction(SIGILL, NULL, &action) && action.sa_sigaction == skip);
	CHECK(!sigprocmask(SIG_BLOCK, NULL, &set) && !sigismember(&set, SIGILL) && !sigismember(&set, SIGSEGV));
}

/* The handler of another signal, which blocks all, enters an enclave. */
static volatile sig_atomic_t alarms;
static void count_inside(int number)
{
	(void)number;
	raw_enter(base + PAGE, data + 8, alarms + 1, PUT, 0);
	alarms++;
}

static void masked(void)
{
	struct sigaction action = {.sa_handler = count_inside}, now;
	struct itimerval soon = {{0, 0}, {0, 1000}}, none = {{0}};
	build();
	catch(SA_NODEFER);
	sigfillset(&action.sa_mask);
	CHECK(!sigaction(SIGALRM, &action, NULL));
	for (int seen = -1; (uint64_t)alarms < times; raw_enter(base, 100000, 0, SPIN, 0))
		if (alarms != seen) { seen = alarms; CHECK(!setitimer(ITIMER_REAL, &soon, NULL)); }
	CHECK(!setitimer(ITIMER_REAL, &none, NULL));
	CHECK(peek(data + 8) == (uint64_t)alarms);
	CHECK(!sigaction(SIGILL, NULL, &now) && now.sa_sigaction == skip && !handled);
}

/* A signal of faults that another process has sent, when the next instruction is an ENCLU that traps. */
static void count_sent(int number, siginfo_t *info, void *context)
{
	(void)context;
	CHECK(info->si_signo == number && info->si_code <= 0);
	handled++;
}

static void sent(void)
{
	struct sigaction action = {.sa_sigaction = count_sent, .sa_flags = SA_SIGINFO};
	build();
	CHECK(!sigaction(SIGILL, &action, NULL) && !sigaction(SIGSEGV, &action, NULL) && !sigaction(SIGBUS, &action, NULL));
	for (time_t until = time(NULL) + 20; handled < times && time(NULL) < until;) raw_enter(base, 100000, 0, SPIN, 0);
	CHECK(handled == times);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"kicked", kicked}, {"bytes", bytes}, {"shared-bytes", shared_bytes}, {"deferred", deferred}, {"masked", masked},
		{"sent", sent},
	};
	CHECK(argc == 5);
	file = argv[1]; enter = find_enter();
	for (unsigned i = 0; i < sizeof operations / sizeof *operations; i++)
		if (!strcmp(argv[3], operations[i].name)) operation = operations[i].operation;
	times = atoi(argv[4]);
	CHECK(enter && operation && times);
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(argv[2], all[i].name)) { all[i].go(); return 0; }
	return 2;
}
