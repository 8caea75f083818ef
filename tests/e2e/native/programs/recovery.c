/*
 * A program that meets what `softsgx run --inject` and `--tick` do to it, and sees what hardware and
 * Linux would show it.
 * usage: recovery ENCLAVE SCENARIO [NUMBER]; exit status 0 says it went well.
 */
#include "sgx.h"

#define SSA_FRAME(thread) (base + (2 + 2 * (thread)) * PAGE)
#define CODE (base + 6 * PAGE)
#define GPR(frame) ((frame) + PAGE - 184)
#define RIP 136

static int number;

static void fill(void)
{
	for (uint64_t i = 0; i < data_pages; i++) put(0, data + i * PAGE, i + 1);
}

static void check_untouched(void)
{
	for (uint64_t i = 0; i < data_pages; i++) CHECK(get(0, data + i * PAGE) == i + 1);
}

static void build_again(void)
{
	munmap((void *)base, size);
	close(device);
	build();
	fill();
	check_untouched();
}

/* Power is lost NUMBER times: the enclave faults where it is entered, and a new one can be made. */
static void lost(void)
{
	struct run run;
	int losses = 0;
	build();
	for (int i = 0; i < 40; i++) {
		CHECK(!call(0, SPIN, 100000, 0, 0, &run));
		if (run.function == 4) continue;
		CHECK((run.function == 2 || run.function == 3) && run.vector == 14);
		CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 2 && run.vector == 14);
		losses++;
		build_again();
	}
	CHECK(losses == number);
}

/* Power is lost when softsgx gets a signal: inside an enclave, and while a system call waits. */
static void signalled(void)
{
	struct run run;
	pid_t supervisor = getppid();
	build();
	do {
		CHECK(!kill(supervisor, SIGUSR1));
		CHECK(!call(0, SPIN, 20000000, 0, 0, &run));
	} while (run.function == 4);
	CHECK(run.vector == 14);
	build_again();

	int ends[2], status;
	uint8_t byte;
	CHECK(!pipe(ends));
	pid_t child = fork();
	if (!child) {
		CHECK(!kill(supervisor, SIGUSR1));
		CHECK(write(ends[1], "x", 1) == 1);
		_exit(0);
	}
	CHECK(read(ends[0], &byte, 1) == 1);
	CHECK(waitpid(child, &status, 0) == child && !status);
	do CHECK(!call(0, NOP, 0, 0, 0, &run)); while (run.function == 4);
	CHECK(run.function == 2 && run.vector == 14);
	build_again();
}

/* The first INIT is refused, and nobody may open the provision device. */
static void denied(void)
{
	CHECK(open("/dev/sgx_provision", O_RDONLY) < 0 && errno == EACCES);
	pid_t child = fork();
	int status;
	if (!child) { CHECK(freopen("/dev/null", "w", stderr)); build(); _exit(0); }
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 1);
	build();
	put(0, data, 5);
	CHECK(get(0, data) == 5);
}

/* INIT fails once with the errno NUMBER; then the same enclave can be initialized. */
static void refused(void)
{
	pid_t child = fork();
	int status;
	if (!child) {
		CHECK(freopen("/dev/null", "w", stderr));
		on_failed_init = number;
		build();
		_exit(99);
	}
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 0);
	build();
	put(0, data, 5);
	CHECK(get(0, data) == 5);
}

static sigjmp_buf back;
static siginfo_t told;
static greg_t told_rip, told_rax;
static void note(int signo, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	told = *info;
	told_rip = uc->uc_mcontext.gregs[REG_RIP];
	told_rax = uc->uc_mcontext.gregs[REG_RAX];
	siglongjmp(back, signo);
}
#define SIGNAL(statement) ({ int signo_ = sigsetjmp(back, 1); if (!signo_) { statement; } signo_; })

/*
 * A page of an enclave is poisoned: the thread that uses it gets SIGBUS, at its AEP or (NUMBER = 2) at
 * EENTER, and the enclave cannot be entered again; but a new one.
 */
static void poisoned(void)
{
	struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_NODEFER};
	struct run run;
	int signo = 0;
	CHECK(!sigaction(SIGBUS, &action, NULL) && !sigaction(SIGSEGV, &action, NULL));
	build();
	for (uint64_t i = 0; i < data_pages && !signo; i++) signo = SIGNAL(raw_enter(base, data + i * PAGE, 1, PUT, 0));
	CHECK(signo == SIGBUS && told.si_code == SI_KERNEL && !told.si_addr && told_rax == number);
	if (number == 3) {
		CHECK(told_rip == (greg_t)raw_aep);
		signo = SIGNAL(raw_enter(base + PAGE, 0, 0, NOP, 0));
		CHECK(signo == SIGSEGV);
		CHECK(!call(1, NOP, 0, 0, 0, &run) && run.function == 2 && run.vector == 14);
	} else {
		CHECK(SIGNAL(call(0, NOP, 0, 0, 0, &run)) == SIGBUS && told.si_code == SI_KERNEL && told_rax == 2);
	}
	build_again();
}

static void noexec(void)
{
	int fd = open("/dev/sgx_enclave", O_RDWR);
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EPERM);
	char *at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(at != MAP_FAILED && mprotect(at, PAGE, PROT_READ | PROT_EXEC) && errno == EACCES);
	CHECK(!mprotect(at, PAGE, PROT_NONE));
}

/*
 * Code of the program stands at the AEP: it counts exits, and enters the enclave on the second SSA
 * frame before it resumes.
 */
uint64_t exits[2], frames[4];
uint64_t watched_enter(uint64_t tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx);
__attribute__((used)) void exited(uint64_t tcs)
{
	exits[(tcs - base) / PAGE]++;
	raw_enter(tcs, 0, 0, REGISTERS, (uint64_t)frames);
}
__asm__(".text\nwatched_enter:\n push %rbp\n mov %rsp,%rbp\n push %rbx\n push %r12\n"
	" mov %rdi,%rbx\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n"
	" lea 2f(%rip),%rcx\n mov $2,%eax\n .byte 0x0f,0x01,0xd7\n jmp 1f\n"
	"2: push %rax\n push %rbx\n push %rcx\n sub $8,%rsp\n"
	" mov %rbx,%rdi\n call exited\n"
	" add $8,%rsp\n pop %rcx\n pop %rbx\n pop %rax\n .byte 0x0f,0x01,0xd7\n"
	"1: lea -16(%rbp),%rsp\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

static void *spin(void *thread)
{
	uint64_t tcs = base + (uint64_t)thread * PAGE, *own = &exits[(uint64_t)thread];
	watched_enter(tcs, 1, 0, SPIN);
	*own = 0;
	for (int i = 0; i < 1000 && *own < (uint64_t)number; i++) watched_enter(tcs, 10000000, 0, SPIN);
	CHECK(*own >= (uint64_t)number);
	return NULL;
}

/* NUMBER ticks or more: the program sees each at its AEP, the enclave in RAX and in its SSA frame. */
static void ticked(void)
{
	build();
	put(0, data, 1);
	CHECK(get(0, data) == 1);
	watched_enter(base, 1, 0, SPIN);
	raw_enter(base, 0, 0, REGISTERS, (uint64_t)frames);
	CHECK(frames[2] == 0);
	exits[0] = 0;
	spin((void *)0);
	CHECK(frames[2] == 1);
	uint64_t rip = get(0, GPR(SSA_FRAME(0)) + RIP);
	CHECK(rip >= CODE && rip < CODE + PAGE);
	CHECK(get(0, data) == 1);
}

/* Nothing interrupts an enclave that has its pages. */
static void quiet(void)
{
	build();
	watched_enter(base, 1, 0, SPIN);
	exits[0] = 0;
	watched_enter(base, 50000000, 0, SPIN);
	CHECK(!exits[0]);
}

/* Each of two threads gets NUMBER ticks. */
static void ticked_threads(void)
{
	pthread_t other;
	build();
	CHECK(!pthread_create(&other, NULL, spin, (void *)1));
	spin((void *)0);
	CHECK(!pthread_join(other, NULL));
}

/* A thread pages while another one is inside all the time. */
static void ticked_paging(void)
{
	pthread_t other;
	build();
	CHECK(!pthread_create(&other, NULL, spin, (void *)1));
	for (int round = 0; round < 4; round++) {
		fill();
		check_untouched();
	}
	CHECK(!pthread_join(other, NULL));
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"lost", lost}, {"signalled", signalled}, {"denied", denied}, {"refused", refused}, {"poisoned", poisoned}, {"noexec", noexec},
		{"quiet", quiet}, {"ticked", ticked}, {"ticked threads", ticked_threads},
		{"ticked paging", ticked_paging},
	};
	CHECK(argc >= 3);
	file = argv[1]; enter = find_enter();
	number = argc > 3 ? atoi(argv[3]) : 0;
	CHECK(enter);
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(argv[2], all[i].name)) { all[i].go(); return 0; }
	return 2;
}
