/*
 * A program that uses SGX; it checks from its own point of view what hardware and Linux promise.
 * usage: host ENCLAVE SCENARIO; exit status 0 says it went well.
 */
#include "sgx.h"
#include <sched.h>

static const char *self;

static void *churn(void *arg)
{
	uint64_t thread = (uint64_t)arg;
	for (int round = 0; round < 3; round++) {
		for (uint64_t i = 0; i < data_pages; i++) put(thread, data + i * PAGE + 8 * thread, i + (thread + 1) * 1000003 + round);
		for (uint64_t i = 0; i < data_pages; i++) CHECK(get(thread, data + i * PAGE + 8 * thread) == i + (thread + 1) * 1000003 + round);
	}
	return NULL;
}

static void paging(void) { build(); churn(0); }

static void threads(void)
{
	pthread_t t;
	build();
	CHECK(!pthread_create(&t, NULL, churn, (void *)1));
	churn(0);
	pthread_join(t, NULL);
}

static void forks(void)
{
	int status;
	build();
	put(0, data + 64, 77);
	pid_t child = fork();
	if (!child) {
		CHECK(get(1, data + 64) == 77);
		churn((void *)1);
		_exit(0);
	}
	churn(0);
	CHECK(waitpid(child, &status, 0) == child && !status);
}

static void execs(void)
{
	int status;
	build();
	pid_t child = vfork();
	if (!child) { execl(self, self, file, "paging", NULL); _exit(99); }
	CHECK(waitpid(child, &status, 0) == child && !status);
	CHECK(get(0, data + PAGE) == 0);
}

static void exceptions(void)
{
	struct run run;
	build();
	CHECK(!call(0, UD2, 0, 0, 0, &run) && run.function == 3 && run.vector == 6);
	build();
	CHECK(!call(0, DIV, 0, 0, 0, &run) && run.function == 3 && run.vector == 0);
	build();
	CHECK(!call(0, PUT, 8, 1, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 6 && run.address == 0);
	build();
	CHECK(!call(0, PUT, base, 1, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 0x8007 && run.address == base);
	build();
	CHECK(!mprotect((void *)data, PAGE, PROT_READ));
	uint64_t value;
	CHECK(!call(1, GET, data, 0, (uint64_t)&value, &run) && run.function == 4);
	CHECK(!call(0, PUT, data + 8, 1, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 7 && run.address == data);
	/* EENTER itself: no TCS, not aligned */
	run = (struct run){.tcs = data};
	CHECK(!enter(0, 0, 0, 2, 0, 0, &run) && run.function == 2 && run.vector == 14);
	run = (struct run){.tcs = base + 8};
	CHECK(!enter(0, 0, 0, 2, 0, 0, &run) && run.function == 2 && run.vector == 13);
	/* the contract of the call */
	run = (struct run){.tcs = base};
	run.reserved[215] = 1;
	CHECK(enter(0, 0, 0, 2, 0, 0, &run) == -EINVAL);
	run.reserved[215] = 0;
	CHECK(enter(0, 0, 0, 4, 0, 0, &run) == -EINVAL);
	CHECK(enter(0, 0, 0, 1, 0, 0, &run) == -EINVAL);
}

static int handled;
static int again(uint64_t rdi, uint64_t rsi, uint64_t rdx, uint64_t rsp, uint64_t r8, uint64_t r9, struct run *run)
{
	CHECK(((uint64_t)__builtin_frame_address(0) & 15) == 0 && rsp > (uint64_t)__builtin_frame_address(0));
	CHECK(run->function == 4 && r9 == 99);
	return ++handled < 5 ? 2 : -7;
}
static void handlers(void)
{
	struct run run = {0};
	build();
	run.tcs = base;
	run.handler = (uint64_t)again;
	CHECK(enter(0, 0, NOP, 2, 0, 99, &run) == -7 && handled == 5);
}

static volatile sig_atomic_t ticks, interrupted;
static uint64_t seen_rip, seen_rax, seen_rbx;
static void tick(int number, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	seen_rip = uc->uc_mcontext.gregs[REG_RIP];
	seen_rax = uc->uc_mcontext.gregs[REG_RAX];
	seen_rbx = uc->uc_mcontext.gregs[REG_RBX];
	ticks++;
	interrupted += seen_rip == (uint64_t)raw_aep && seen_rax == 3 && seen_rbx == base;
}

static void on(int number)
{
	struct sigaction action = {.sa_sigaction = tick, .sa_flags = SA_SIGINFO};
	CHECK(!sigaction(number, &action, NULL));
}

/* One signal, so many microseconds from now.  A timer that repeats could leave a slow machine no time
 * for the program. */
static void signal_in(long us)
{
	struct itimerval once = {.it_value.tv_usec = us};
	CHECK(!setitimer(ITIMER_REAL, &once, NULL));
}

/* Calls that signals interrupt, and those that use all pages. */
static void spin_under_signals(void)
{
	struct run run;
	for (int i = 0, seen = -1; i < 40 || ticks < 8; i++) {
		if (ticks != seen) seen = ticks, signal_in(3000);
		CHECK(!call(0, SPIN, 3000000, 0, 0, &run) && run.function == 4);
	}
}

static void signals(void)
{
	build();
	on(SIGALRM);
	spin_under_signals();
	for (int i = 0; i < 3; i++) signal_in(3000), churn(0);
}

static sigjmp_buf *jump;
static void leave(int number, siginfo_t *info, void *context)
{
	tick(number, info, context);
	siglongjmp(*jump, number);
}
#include <setjmp.h>
static void raw(void)
{
	struct itimerval stop = {{0}};
	sigjmp_buf buffer;
	uint64_t value = 0;
	build();
	raw_enter(base, data, 4711, PUT, 0);
	raw_enter(base, data, 0, GET, (uint64_t)&value);
	CHECK(value == 4711);
	on(SIGALRM);
	for (int i = 0; i < 200 && !interrupted; i++) signal_in(3000), raw_enter(base, 20000000, 0, SPIN, 0);
	setitimer(ITIMER_REAL, &stop, NULL);
	CHECK(interrupted);
	struct sigaction action = {.sa_sigaction = leave, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	jump = &buffer;
	int number = sigsetjmp(buffer, 1);
	if (!number) { raw_enter(base, 0, 0, UD2, 0); CHECK(0); }
	CHECK(number == SIGILL && seen_rip == (uint64_t)raw_aep && seen_rax == 3);
	number = sigsetjmp(buffer, 1);
	if (!number) { raw_enter(base + 8, 0, 0, NOP, 0); CHECK(0); }
	CHECK(number == SIGSEGV && seen_rax == 2);
}

static void blocked(void)
{
	sigset_t set;
	struct sigaction action;
	build();
	on(SIGSEGV); on(SIGBUS); on(SIGILL);
	sigemptyset(&set);
	sigaddset(&set, SIGSEGV); sigaddset(&set, SIGBUS); sigaddset(&set, SIGILL);
	sigprocmask(SIG_BLOCK, &set, NULL);
	churn(0);
	sigset_t now;
	sigprocmask(SIG_BLOCK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) && sigismember(&now, SIGBUS) && sigismember(&now, SIGILL));
	sigaction(SIGBUS, NULL, &action);
	CHECK(action.sa_sigaction == tick);
	sigaction(SIGILL, NULL, &action);
	CHECK(action.sa_sigaction == tick && !ticks);
}

/* The signals of faults are blocked, and another one is handled in the middle of the enclave. */
static void shielded(void)
{
	int faults[] = {SIGSEGV, SIGBUS, SIGILL};
	struct itimerval stop = {{0}};
	struct sigaction action;
	sigset_t set, now;
	build();
	on(SIGALRM);
	sigemptyset(&set);
	for (int i = 0; i < 3; i++) { on(faults[i]); sigaddset(&set, faults[i]); }
	sigprocmask(SIG_BLOCK, &set, NULL);
	spin_under_signals();
	setitimer(ITIMER_REAL, &stop, NULL);
	churn(0);
	sigprocmask(SIG_BLOCK, NULL, &now);
	for (int i = 0; i < 3; i++) {
		CHECK(sigismember(&now, faults[i]));
		CHECK(!sigaction(faults[i], NULL, &action) && action.sa_sigaction == tick);
	}
}

/* Short calls, interrupted wherever a timer does it, by a handler that makes calls of its own. */
static __thread uint64_t mine;
static uint64_t rings;
static volatile sig_atomic_t armed;
static void ring(int number, siginfo_t *info, void *context)
{
	put(1, data + 8, ++rings);
	CHECK(get(1, data + 8) == rings);
	mine++;
	armed = 0;
}
static void often(void)
{
	struct sigaction action = {.sa_sigaction = ring, .sa_flags = SA_SIGINFO};
	struct itimerval stop = {{0}};
	sigset_t set;
	build();
	on(SIGSEGV); on(SIGBUS); on(SIGILL);
	CHECK(!sigaction(SIGALRM, &action, NULL));
	for (uint64_t i = 0; i < 6000; i++) {
		/* Again only when a call was made: the handler may take longer than that. */
		if (!armed) { armed = 1; signal_in(700); }
		put(0, data, i);
		if (i % 8 == 0) CHECK(get(0, data) == i);
	}
	setitimer(ITIMER_REAL, &stop, NULL);
	CHECK(rings && mine == rings && get(0, data + 8) == rings);
	/* Between two calls the signals of faults are blocked, and the next call has one. */
	sigemptyset(&set);
	sigaddset(&set, SIGSEGV); sigaddset(&set, SIGBUS); sigaddset(&set, SIGILL);
	for (uint64_t i = 0; i < 3 * data_pages; i++) {
		uint64_t at = data + (i * 7 % data_pages) * PAGE;
		put(0, data, i); put(0, data, i);
		sigprocmask(SIG_BLOCK, &set, NULL);
		put(0, at + 16, i);
		sigprocmask(SIG_UNBLOCK, &set, NULL);
		CHECK(get(0, at + 16) == i);
		CHECK(!sigaction(SIGBUS, NULL, &action) && action.sa_sigaction == tick);
	}
	CHECK(!sigaction(SIGSEGV, NULL, &action) && action.sa_sigaction == tick && !ticks);
	/* A copy of the program has the page that says what may be entered, too. */
	pid_t child = fork();
	for (uint64_t i = 0; i < 200; i++) put(!child, data + 24 + 8 * !child, i);
	if (!child) _exit(get(1, data + 32) != 199);
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status);
	for (uint64_t i = 0; i < 200; i++) put(0, data + 24, i);
	CHECK(get(0, data + 24) == 199);
}

/* Now one thread, now two, and calls by all of them. */
static void *second(void *unused)
{
	for (uint64_t i = 0; i < 30; i++) {
		put(1, data + PAGE + 8 * (i % 16), i);
		CHECK(get(1, data + PAGE + 8 * (i % 16)) == i);
	}
	return unused;
}
static void alternating(void)
{
	build();
	for (uint64_t round = 0; round < 12; round++) {
		pthread_t thread;
		for (uint64_t i = 0; i < 20; i++) put(0, data + 8 * i, round + i);
		CHECK(!pthread_create(&thread, NULL, second, NULL));
		for (uint64_t i = 0; i < 20; i++) CHECK(get(0, data + 8 * i) == round + i);
		CHECK(!pthread_join(thread, NULL));
		for (uint64_t page = 2; page < data_pages; page++) put(0, data + page * PAGE, round * page);
		for (uint64_t page = 2; page < data_pages; page++) CHECK(get(0, data + page * PAGE) == round * page);
	}
}

/* Where EENTER notes RSP for asynchronous exits: URSP of the first SSA frame of thread 0. */
static uint64_t ursp(void) { return base + 3 * PAGE - 184 + 144; }
__attribute__((noinline)) static uint64_t depth_of_ursp(int deeper)
{
	volatile char room[512];
	room[0] = deeper;
	if (deeper) { uint64_t found = depth_of_ursp(deeper - 1); room[1] = 1; return found; }
	return (uint64_t)__builtin_frame_address(0) - get(0, ursp());
}
static void stacks(void)
{
	build();
	uint64_t first = depth_of_ursp(0);
	for (int round = 0; round < 20; round++)
		for (int deeper = 0; deeper < 5; deeper++) CHECK(depth_of_ursp(deeper) == first);
	/* What the enclave puts there itself stays until the next EENTER, whatever stops it. */
	for (uint64_t i = 0; i < data_pages; i++) {
		struct run run = {.tcs = base};
		uint64_t seen = 0;
		get(0, data); get(0, data);
		CHECK(!enter(ursp(), 1000 + i, KEEP, 2, (uint64_t)&seen, data + i * PAGE, &run));
		CHECK(run.function == 4 && seen == 1000 + i);
	}
}

/* Loads from pages that are mapped read-only, each of which has left the EPC meanwhile. */
static void readers(void)
{
	build();
	for (uint64_t i = 0; i < data_pages; i++) put(0, data + i * PAGE, i);
	CHECK(!mprotect((void *)data, data_pages * PAGE, PROT_READ));
	for (uint64_t i = 0; i < 3 * data_pages; i++) CHECK(get(i & 1, data + i * 7 % data_pages * PAGE) == i * 7 % data_pages);
}

/* Code of the program stands in front of the ENCLU at the AEP: every exit passes it. */
uint64_t exits;
uint64_t counted_enter(uint64_t tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx);
__asm__(".text\ncounted_enter:\n push %rbp\n mov %rsp,%rbp\n push %rbx\n push %r12\n"
	" mov %rdi,%rbx\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n"
	" lea 2f(%rip),%rcx\n mov $2,%eax\n .byte 0x0f,0x01,0xd7\n jmp 1f\n"
	"2: incq exits(%rip)\n .byte 0x0f,0x01,0xd7\n"
	"1: lea -16(%rbp),%rsp\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
static void counted(void)
{
	build();
	put(0, data, 1);
	uint64_t before = exits;
	for (uint64_t i = 0; i < 3 * data_pages; i++) counted_enter(base, data + i % data_pages * PAGE, i, PUT);
	CHECK(exits >= before + data_pages);
	for (uint64_t i = 0; i < data_pages; i++) CHECK(get(1, data + i * PAGE) == 2 * data_pages + i);
}

/* All registers but RAX, RBX and RCX are passed as they are. */
int enter_with(struct run *run, enter_t *fn, uint64_t out[4], uint64_t r10, uint64_t r11);
__asm__(".text\nenter_with:\n push %rbp\n mov %rsp,%rbp\n sub $16,%rsp\n mov %rdi,(%rsp)\n"
	" mov %rsi,%rax\n mov %rcx,%r10\n mov %r8,%r11\n mov %rdx,%r8\n mov $10,%edx\n mov $2,%ecx\n"
	" call *%rax\n leave\n ret\n");
static void registers(void)
{
	uint64_t out[4];
	build();
	for (uint64_t i = 0; i < 20; i++) {
		struct run run = {.tcs = base};
		CHECK(!enter_with(&run, enter, out, i + 0x1010101010101010, ~i) && run.function == 4);
		CHECK(out[0] == i + 0x1010101010101010 && out[1] == ~i && out[2] == 0);
		CHECK(out[3] > (uint64_t)enter && out[3] < (uint64_t)enter + PAGE);
	}
}

static void names(void)
{
	struct stat st;
	struct statx stx;
	char text[64] = {0}, link[64];
	CHECK(!stat("/dev/sgx_enclave", &st) && S_ISCHR(st.st_mode) && st.st_rdev);
	CHECK(!lstat("/dev/sgx/enclave", &st) && S_ISCHR(st.st_mode));
	CHECK(!statx(AT_FDCWD, "/dev/sgx_provision", 0, STATX_ALL, &stx) && S_ISCHR(stx.stx_mode));
	CHECK(!access("/dev/sgx_enclave", R_OK | W_OK) && access("/dev/sgx_enclave", X_OK));
	CHECK(access("/dev/sgx_nothing", F_OK) && errno == ENOENT);
	CHECK(readlink("/dev/sgx_enclave", text, sizeof text) < 0 && errno == EINVAL);
	int one = open("/dev/sgx_enclave", O_RDWR), two = dup(one), three = open("/dev/sgx_provision", O_RDONLY);
	CHECK(one >= 0 && two == one + 1 && three == two + 1);
	CHECK(!fstat(two, &st) && S_ISCHR(st.st_mode));
	snprintf(link, sizeof link, "/proc/self/fd/%d", two);
	CHECK(readlink(link, text, sizeof text) == 16 && !strcmp(text, "/dev/sgx_enclave"));
	CHECK(open("/dev/sgx_enclave", O_RDWR | O_CREAT | O_EXCL, 0600) < 0 && errno == EEXIST);
	CHECK(fcntl(one, F_GETFD) == 0 && (fcntl(open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC), F_GETFD) & FD_CLOEXEC));
	int yes = 1;
	CHECK(!ioctl(one, FIOCLEX) && fcntl(one, F_GETFD) == FD_CLOEXEC && !ioctl(one, FIONCLEX) && fcntl(one, F_GETFD) == 0);
	CHECK(!ioctl(one, FIONBIO, &yes) && (fcntl(one, F_GETFL) & O_NONBLOCK) && ioctl(one, TCGETS, text) == -1 && errno == ENOTTY);
	CHECK(!fcntl(one, F_SETFL, 0) && fcntl(one, F_GET_SEALS) == -1 && errno == EINVAL);
	uint64_t zero[5] = {0};
	CHECK(ioctl(one, 0xc028a405, zero) == -1 && errno == EINVAL);
	CHECK(ioctl(one, 0x4008a4ff, zero) == -1 && errno == ENOTTY);
	CHECK(ioctl(three, 0x4008a400, zero) == -1 && errno == ENOTTY);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, one, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, one, 0) != MAP_FAILED);
}

static void cpuid(void)
{
	unsigned a, b, c, d;
	__cpuid_count(7, 0, a, b, c, d);
	CHECK(b & 4);
	__cpuid(0, a, b, c, d);
	CHECK(a >= 0x12);
	__cpuid_count(0x12, 0, a, b, c, d);
	CHECK(a & 1);
	__cpuid_count(0x12, 2, a, b, c, d);
	CHECK((a & 15) == 1);
	printf("%u\n", c & 0xfffff000);
	__cpuid_count(0x12, 3, a, b, c, d);
	CHECK(!a && !b && !c && !d);
}

static void reopen(void)
{
	for (int i = 0; i < 8; i++) {
		build();
		put(0, data, i);
		munmap((void *)base, size);
		close(device);
	}
}

/* A fault of enclave code is handled by entering again from within the signal handler. */
static void mend(int number, siginfo_t *info, void *context)
{
	uint64_t value = 0;
	tick(number, info, context);
	CHECK(seen_rip == (uint64_t)raw_aep && seen_rax == 3 && seen_rbx == base);
	CHECK((uint64_t)info->si_addr == data && number == SIGSEGV);
	raw_enter(base, data + 8, 0, GET, (uint64_t)&value);
	CHECK(value == 5);
	CHECK(!mprotect((void *)data, PAGE, PROT_READ | PROT_WRITE));
}
static void nested(void)
{
	struct sigaction action = {.sa_sigaction = mend, .sa_flags = SA_SIGINFO | SA_NODEFER};
	build();
	raw_enter(base, data + 8, 5, PUT, 0);
	CHECK(!sigaction(SIGSEGV, &action, NULL));
	CHECK(!mprotect((void *)data, PAGE, PROT_READ));
	raw_enter(base, data, 6, PUT, 0);
	CHECK(ticks == 1 && get(0, data) == 6);
}

/* A SECINFO at the start of the last data page, then the leaf with it. */
static int leaf(int op, uint64_t page, uint64_t flags, struct run *run, uint64_t *result)
{
	uint64_t info = data + (data_pages - 1) * PAGE;
	put(1, info, flags);
	*result = 99;
	return call(1, op, page, info, (uint64_t)result, run);
}

static void dynamic(void)
{
	struct run run;
	uint64_t result, page, value;
	build();
	page = data + data_pages * PAGE;
	CHECK(page + PAGE <= base + size);
	CHECK(mmap((void *)page, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
	/* the first touch makes a pending page, which must be accepted before it is used */
	CHECK(!call(0, PUT, page, 1, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 0x8007 && run.address == page);
	CHECK(!leaf(ACCEPT, page, 0x20b, &run, &result) && run.function == 4 && result == 0);
	CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
	CHECK(get(0, page) == 1);
	/* without a right it cannot be used; the enclave may give the right back */
	uint64_t restrict_to[5] = {page - base, PAGE, 1, 0, 0};
	CHECK(!ioctl(device, 0xc028a405, restrict_to) && restrict_to[4] == PAGE);
	CHECK(!leaf(ACCEPT, page, 0x221, &run, &result) && result == 0);
	CHECK(!call(0, PUT, page, 2, 0, &run) && run.function == 3 && run.code == 0x8007);
	CHECK(!leaf(EXTEND, page, 0x203, &run, &result) && run.function == 4);
	CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
	CHECK(get(0, page) == 2);
	/* trimmed, accepted, removed; then a new page can be there */
	uint64_t trim[5] = {page - base, PAGE, 4, 0, 0}, gone[3] = {page - base, PAGE, 0};
	CHECK(!ioctl(device, 0xc028a406, trim) && trim[4] == PAGE);
	CHECK(ioctl(device, 0xc018a407, gone) == -1 && errno == EPERM);
	CHECK(!leaf(ACCEPT, page, 0x410, &run, &result) && result == 0);
	CHECK(!call(1, GET, page, 0, (uint64_t)&value, &run) && run.function == 3 && run.code == 0x8005);
	gone[2] = 0;
	CHECK(!ioctl(device, 0xc018a407, gone) && gone[2] == PAGE);
	CHECK(!call(0, ACCEPT, page, data + (data_pages - 1) * PAGE, (uint64_t)&result, &run));
	put(0, data + (data_pages - 1) * PAGE, 0x20b);
	CHECK(!call(0, ACCEPT, page, data + (data_pages - 1) * PAGE, (uint64_t)&result, &run) && result == 0);
	CHECK(get(0, page) == 0);
}

/* The EPCM takes rights away from pages whose mapping has them all; each thread has a page to spare. */
#define BACK 0xe3ff41ul /* jmp r11 */
#define REFUSED(op, thread, error) (!call(thread, op, page, BACK, (uint64_t)&value, &run) && run.function == 3 && run.vector == 14 && run.code == (error) && run.address == page)
#define RESUMED (!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4)
static void restrict_to(uint64_t page, uint64_t rwx)
{
	struct run run;
	uint64_t to[5] = {page - base, PAGE, rwx, 0, 0}, result;
	CHECK(!ioctl(device, 0xc028a405, to) && to[4] == PAGE);
	CHECK(!leaf(ACCEPT, page, 0x220 | rwx, &run, &result) && result == 0);
}
static void rights(void)
{
	struct run run;
	struct sigaction action = {.sa_sigaction = leave, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigjmp_buf buffer;
	uint64_t result, value, page;
	int status;
	build();
	page = data + data_pages * PAGE;
	CHECK(mmap((void *)page, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
	CHECK(!leaf(ACCEPT, page, 0x20b, &run, &result) && result == 0);
	put(1, page, BACK);
	CHECK(REFUSED(RUN, 0, 0x8015));
	CHECK(!leaf(EXTEND, page, 0x207, &run, &result) && RESUMED);
	CHECK(!call(0, RUN, page, 0, 0, &run) && run.function == 4);
	/* without X again, and wherever the page has been meanwhile */
	restrict_to(page, 3);
	for (uint64_t i = 0; i < data_pages; i++) put(1, data + i * PAGE + 64, i);
	CHECK(!mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE));
	CHECK(!mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
	put(1, page, BACK);
	CHECK(REFUSED(RUN, 0, 0x8015));
	CHECK(!leaf(EXTEND, page, 0x207, &run, &result) && RESUMED);
	/* code that cannot be written, also in a copy of the program */
	restrict_to(page, 5);
	CHECK(!call(0, RUN, page, 0, 0, &run) && run.function == 4);
	CHECK(REFUSED(PUT, 0, 0x8007));
	pid_t child = fork();
	if (!child) {
		CHECK(!call(1, RUN, page, 0, 0, &run) && run.function == 4);
		CHECK(REFUSED(PUT, 1, 0x8007));
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	CHECK(!leaf(EXTEND, page, 0x207, &run, &result) && RESUMED);
	restrict_to(page, 3);
	put(1, page, BACK);
	child = fork();
	if (!child) {
		CHECK(REFUSED(RUN, 0, 0x8015));
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	/* code outside fetches ones */
	CHECK(!sigaction(SIGILL, &action, NULL));
	jump = &buffer;
	int number = sigsetjmp(buffer, 1);
	if (!number) { ((void (*)(void))page)(); CHECK(0); }
	CHECK(number == SIGILL && seen_rip == page);
}
static void unreadable(void)
{
	struct run run;
	uint64_t result, value, page = 0;
	build();
	page = data;
	put(0, page, BACK);
	restrict_to(page, 0);
	CHECK(*(volatile uint64_t *)page == ~0ul);
	CHECK(REFUSED(GET, 0, 0x8005));
	CHECK(!leaf(EXTEND, page, 0x203, &run, &result) && RESUMED && value == BACK);
	restrict_to(page, 1);
	*(volatile uint64_t *)page = 7; /* dropped: code outside finds the abort page */
	CHECK(get(0, page) == BACK);
	CHECK(REFUSED(PUT, 0, 0x8007));
	CHECK(!leaf(EXTEND, page, 0x203, &run, &result) && RESUMED && get(1, page) == BACK);
	/* EENTER stores in the TCS */
	CHECK(!mprotect((void *)base, PAGE, PROT_READ));
	CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 2 && run.vector == 14 && run.code == 7 && run.address == base);
}

/* Ordinary memory in the place of pages of an enclave is not of the enclave; others may use it. */
static void foreign(void)
{
	struct run run;
	uint64_t value, page = data + PAGE;
	build();
	page = data + PAGE;
	put(1, page, 5);
	char *mapped = mmap((void *)page, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(mapped == (char *)page);
	strcpy(mapped, "foreign");
	CHECK(!call(0, GET, page, 0, (uint64_t)&value, &run) && run.function == 3 && run.vector == 14 && run.code == 0x8005 && run.address == page);
	memset(mapped + PAGE - 40, 7, 80);
	CHECK(!strcmp(mapped, "foreign") && mapped[PAGE + 39] == 7 && !mapped[PAGE + 40]);
	CHECK(!call(0, PUT, page, 9, 0, &run) && run.function == 3 && run.code == 0x8007);
	CHECK(!strcmp(mapped, "foreign"));
	CHECK(!mprotect(mapped, PAGE, PROT_READ));
	CHECK(!call(1, PUT, page, 9, 0, &run) && run.function == 3 && run.code == 7);
	pid_t child = fork();
	if (!child) {
		CHECK(!strcmp(mapped, "foreign"));
		CHECK(!call(1, GET, page + PAGE, 0, (uint64_t)&value, &run) && run.function == 3 && run.code == 0x8005);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status);
	/* the enclave's own again */
	CHECK(mmap((void *)page, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device, 0) == mapped);
	CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
	CHECK(mmap((void *)page, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == mapped);
	/* memory like other memory when the enclave is gone */
	munmap((void *)base, page - base);
	munmap((void *)(page + PAGE), base + size - page - PAGE);
	close(device);
	CHECK(!mapped[0] && !mprotect(mapped, PAGE, PROT_READ | PROT_WRITE));
	mapped[0] = 1;
	CHECK(mapped[0] == 1);
}

/* No child is out of sight, and the first process of a namespace ends by its fault. */
static void untraced(void)
{
	uint64_t flags[8] = {CLONE_UNTRACED, 0, 0, 0, SIGCHLD};
	int status;
	build();
	put(0, data, 5);
	for (int way = 0; way < 2; way++) {
		pid_t child = way ? syscall(SYS_clone3, flags, sizeof flags) : syscall(SYS_clone, CLONE_UNTRACED | SIGCHLD, 0, 0, 0, 0);
		if (!child) _exit(get(0, data) == 5 && access("/dev/sgx_enclave", R_OK) == 0 ? 0 : 1);
		CHECK(child > 0 && waitpid(child, &status, 0) == child && !status);
	}
	pid_t first = syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);
	if (!first) { *(volatile int *)8 = 1; _exit(0); }
	CHECK((first < 0 && errno == EPERM) || (waitpid(first, &status, 0) == first && WIFSIGNALED(status)));
}

/* So is memory that is moved there, with the rights it has. */
static void moved(void)
{
	struct run run;
	uint64_t value, page;
	build();
	page = data + 3 * PAGE;
	char *mapped = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	strcpy(mapped, "moved");
	CHECK(mremap(mapped, 2 * PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)page) == (void *)page);
	CHECK(!call(0, GET, page, 0, (uint64_t)&value, &run) && run.function == 3 && run.vector == 14 && run.code == 0x8005);
	CHECK(!strcmp((char *)page, "moved"));
	/* moving it away fails, then succeeds */
	CHECK(mremap((void *)page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)8) == MAP_FAILED && errno == EINVAL);
	CHECK(mremap((void *)page, PAGE, 1ul << 45, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)(1ul << 45)) == MAP_FAILED && errno == ENOMEM);
	CHECK(!call(0, GET, page, 0, (uint64_t)&value, &run) && run.function == 3 && run.code == 0x8005);
	CHECK(mremap((void *)page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, mapped) == mapped && !strcmp(mapped, "moved"));
	strcpy(mapped, "again");
	/* a mapping that is refused unmaps nothing where it should have been */
	CHECK(mmap(mapped, PAGE, PROT_READ, MAP_PRIVATE, device, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(!strcmp(mapped, "again"));
	/* the order of checks: what the arguments say comes before what is mapped */
	CHECK(mremap((void *)data, PAGE, 0, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mremap((void *)data, PAGE, PAGE, MREMAP_FIXED, (void *)page) == MAP_FAILED && errno == EINVAL);
	CHECK(mremap((void *)data, PAGE, PAGE, MREMAP_MAYMOVE | 4, 0) == MAP_FAILED && errno == EINVAL);
	put(1, data, 7);
	CHECK(get(1, data) == 7);
}

static void endless(void)
{
	struct run run;
	build();
	printf("%d\n", getpid());
	fflush(stdout);
	for (;;) call(0, SPIN, 100000000, 0, 0, &run);
}

static void waits(void)
{
	paging();
	printf("%d\n", getpid());
	fflush(stdout);
	CHECK(getchar() != EOF);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"paging", paging}, {"threads", threads}, {"forks", forks}, {"execs", execs},
		{"exceptions", exceptions}, {"handlers", handlers}, {"signals", signals}, {"raw", raw},
		{"blocked", blocked}, {"shielded", shielded}, {"often", often}, {"alternating", alternating}, {"stacks", stacks}, {"foreign", foreign}, {"moved", moved}, {"untraced", untraced}, {"rights", rights}, {"unreadable", unreadable}, {"readers", readers}, {"counted", counted}, {"registers", registers}, {"names", names}, {"cpuid", cpuid}, {"reopen", reopen}, {"nested", nested}, {"dynamic", dynamic}, {"endless", endless}, {"waits", waits},
	};
	CHECK(argc == 3);
	self = argv[0]; file = argv[1]; enter = find_enter();
	CHECK(enter);
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(argv[2], all[i].name)) { all[i].go(); return 0; }
	return 2;
}
