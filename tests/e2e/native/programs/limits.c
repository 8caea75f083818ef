/*
 * A program that does with an enclave what it must not, from outside and from inside.
 * usage: limits ENCLAVE SCENARIO [NUMBER]; exit status 0 says that hardware would have done the same.
 */
#include "sgx.h"
#include <sys/uio.h>

#define ONES (~0ul)
#define SSA_FRAME(thread) (base + (2 + 2 * (thread)) * PAGE)
#define CODE (base + 6 * PAGE)
#define GPR(frame) ((frame) + PAGE - 184)
#define RIP 136
#define EXITINFO 160

static int number;
static sigjmp_buf jump;
static siginfo_t told;
static uint64_t seen_rip, seen_rax, seen_xmm0;

static void leave(int signo, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	told = *info;
	seen_rip = uc->uc_mcontext.gregs[REG_RIP];
	seen_rax = uc->uc_mcontext.gregs[REG_RAX];
	memcpy(&seen_xmm0, &uc->uc_mcontext.fpregs->_xmm[0], 8);
	siglongjmp(jump, signo);
}

static void catch(void)
{
	struct sigaction action = {.sa_sigaction = leave, .sa_flags = SA_SIGINFO | SA_NODEFER};
	int all[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++) CHECK(!sigaction(all[i], &action, NULL));
}
/* The signal that a statement ends with, 0 for none. */
#define SIGNAL(statement) ({ int signo_ = sigsetjmp(jump, 1); if (!signo_) { statement; } signo_; })

static uint64_t load(uint64_t at) { return *(volatile uint64_t *)at; }

static void fill(void)
{
	for (uint64_t i = 0; i < data_pages; i++) put(0, data + i * PAGE, i + 1);
}

static void check_untouched(void)
{
	for (uint64_t i = 0; i < data_pages; i++) CHECK(get(0, data + i * PAGE) == i + 1);
}

/* Every page reads as ones and swallows what is stored, whatever the instruction. */
static void ones(void)
{
	char bytes[300];
	uint64_t a, b, flags;
	build();
	fill();
	for (uint64_t at = base; at < data + data_pages * PAGE; at += PAGE) {
		if (at == CODE + PAGE) continue; /* nothing is there */
		CHECK(load(at) == ONES);
		if (at != CODE) *(volatile uint64_t *)at = 5;
		CHECK(load(at) == ONES);
	}
	CHECK(*(volatile uint8_t *)(data + 1) == 0xff && *(volatile int16_t *)(data + 2) == -1);
	CHECK(load(data + PAGE - 4) == ONES); /* two pages */
	memset(bytes, 0, sizeof bytes);
	__asm__ volatile("rep movsb" : "=D"(a), "=S"(b), "=c"(flags) : "0"(bytes), "1"(data + PAGE - 100), "2"(sizeof bytes) : "memory");
	for (unsigned i = 0; i < sizeof bytes; i++) CHECK(bytes[i] == (char)0xff);
	__asm__ volatile("rep stosb" : "=D"(a), "=c"(b) : "0"(data), "1"(200), "a"(7) : "memory");
	CHECK(a == data + 200 && b == 0);
	__asm__ volatile("movups (%1), %%xmm3\n movups %%xmm3, (%2)\n movups %%xmm3, (%0)" :: "r"(bytes), "r"(data + 64), "r"(data + PAGE - 8) : "xmm3", "memory");
	CHECK(!memcmp(bytes, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 16));
	a = 9;
	__asm__ volatile("xchg %0, (%1)" : "+r"(a) : "r"(data) : "memory");
	CHECK(a == ONES);
	a = 3;
	__asm__ volatile("lock xadd %0, (%1)" : "+r"(a) : "r"(data) : "memory");
	CHECK(a == ONES);
	__asm__ volatile("incq (%1)\n pushfq\n pop %0" : "=r"(flags) : "r"(data) : "memory", "cc");
	CHECK(flags & 0x40); /* ones plus one is zero */
	__asm__ volatile("mov %%rsp, %0\n mov %1, %%rsp\n push $77\n mov %0, %%rsp" : "=&r"(a) : "r"(data + PAGE) : "memory");
	check_untouched();
	/* what page tables say comes first */
	catch();
	CHECK(!mprotect((void *)data, PAGE, PROT_READ) && load(data) == ONES);
	CHECK(SIGNAL(*(volatile uint64_t *)data = 1) == SIGSEGV && told.si_code == SEGV_ACCERR && (uint64_t)told.si_addr == data);
	CHECK(!mprotect((void *)data, PAGE, PROT_NONE));
	CHECK(SIGNAL(load(data)) == SIGSEGV && (uint64_t)told.si_addr == data);
	CHECK(!mprotect((void *)data, PAGE, PROT_READ | PROT_WRITE) && load(data) == ONES);
	CHECK(SIGNAL(((void (*)(void))CODE)()) == SIGILL && seen_rip == CODE);
	check_untouched();
	/* the kernel, copying in our name */
	int pipes[2];
	CHECK(!pipe(pipes));
	CHECK(write(pipes[1], (void *)data, 8) == -1 && errno == EFAULT);
	CHECK(write(pipes[1], "12345678", 8) == 8);
	CHECK(read(pipes[0], (void *)data, 8) == -1 && errno == EFAULT);
	check_untouched();
}

/* Without strict mode the bytes are there; what enclave code cannot use itself is still ones. */
static void fast(void)
{
	build();
	fill();
	CHECK(load(data) == 1);
	CHECK(load(base) == ONES);
	*(volatile uint64_t *)base = 5;
	CHECK(load(base + 8) == ONES);
	check_untouched();
}

static volatile int finished;
static volatile uint64_t looks;
static void *spy(void *unused)
{
	(void)unused;
	while (!finished || looks < 20) {
		for (uint64_t i = 0; i < data_pages; i += 3) CHECK(load(data + i * PAGE) == ONES);
		*(volatile uint64_t *)data = 1234567;
		looks++;
	}
	return NULL;
}

static void *inhabit(void *arg)
{
	uint64_t thread = (uint64_t)arg;
	struct run run;
	for (int round = 0; round < 4; round++) {
		for (uint64_t i = 0; i < data_pages; i++) put(thread, data + i * PAGE + 8 * thread, i + round * 1000 + thread);
		CHECK(!call(thread, SPIN, 3000000, 0, 0, &run) && run.function == 4);
		for (uint64_t i = 0; i < data_pages; i++) CHECK(get(thread, data + i * PAGE + 8 * thread) == i + round * 1000 + thread);
	}
	return NULL;
}

static void *sleeper(void *arg)
{
	char byte;
	CHECK(read(*(int *)arg, &byte, 1) == 1);
	return NULL;
}

/* One looks from outside, another sleeps in the kernel, while two are inside. */
static void spies(void)
{
	pthread_t one, two, three;
	int pipes[2];
	build();
	CHECK(!pipe(pipes));
	CHECK(!pthread_create(&three, NULL, sleeper, &pipes[0]));
	CHECK(!pthread_create(&one, NULL, spy, NULL) && !pthread_create(&two, NULL, inhabit, (void *)1));
	inhabit(0);
	pthread_join(two, NULL);
	finished = 1;
	pthread_join(one, NULL);
	CHECK(looks >= 20 && write(pipes[1], "", 1) == 1);
	pthread_join(three, NULL);
	CHECK(get(0, data) == 3000);
}

/* Enclave code that reaches into another enclave is outside of that one. */
static void neighbours(void)
{
	uint64_t theirs;
	build();
	fill();
	theirs = data;
	uint64_t first = base;
	build();
	put(0, data, 4711);
	CHECK(get(0, theirs) == ONES);
	put(0, theirs + PAGE, 99);
	CHECK(get(0, first) == ONES);
	CHECK(get(0, data) == 4711);
	base = first;
	data = theirs;
	check_untouched();
}

static void children(void)
{
	int status;
	build();
	fill();
	pid_t child = fork();
	if (!child) {
		CHECK(load(data) == ONES && load(data + 5 * PAGE) == ONES);
		*(volatile uint64_t *)data = 5;
		CHECK(get(1, data) == 1);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	CHECK(load(data) == ONES);
	check_untouched();
}

/* An instruction that no enclave may execute, its number and length given: #UD, then behind it. */
static void illegal(void)
{
	struct run run;
	int op = FIRST_ILLEGAL + number / 100, length = number % 100;
	build();
	CHECK(!call(0, op, 0, 39, 0, &run) && run.function == 3 && run.vector == 6 && run.code == 0);
	uint64_t frame = SSA_FRAME(0), rip = get(0, GPR(frame) + RIP);
	CHECK((get(0, GPR(frame) + EXITINFO) & 0xffffffff) == (6 | 3 << 8 | 1u << 31));
	put(0, GPR(frame) + RIP, rip + length);
	CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
	catch();
	CHECK(SIGNAL(raw_enter(base, 0, 39, op, 0)) == SIGILL && seen_rip == (uint64_t)raw_aep && seen_rax == 3);
	/* outside, and in other enclaves, nothing has changed */
	CHECK(syscall(SYS_getpid) == getpid());
	build();
	put(0, data, 6);
	CHECK(get(0, data) == 6);
}

/* What the enclave had behind SAVE or RESTORE, which change neither registers nor flags. */
struct seen { uint64_t xmm, rax, rcx, rdx, flags, rcx_before; };

static int kept(const struct seen *seen)
{
	return seen->rax == -1ul && seen->rdx == -1ul && seen->rcx == seen->rcx_before && (seen->flags & 0x8c5) == 0x85;
}

/* XFRM is 3: XCR0 is 3 inside, and XSAVE with every bit writes x87, SSE and the header only. */
static void state(void)
{
	struct run run;
	struct seen seen;
	uint64_t bits = 0, area = data;
	build();
	area = data + PAGE - 512; /* the header is in the next page */
	CHECK(!call(0, GETBV, 0, 0, (uint64_t)&bits, &run) && run.function == 4 && bits == 3);
	for (uint64_t at = 512; at < 576; at += 8) put(0, area + at, 0);
	for (uint64_t at = 576; at < 4000; at += 8) put(0, area + at, 0x5a5a5a5a);
	CHECK(!call(0, SAVE, area, 0, (uint64_t)&seen, &run) && run.function == 4 && kept(&seen));
	CHECK(!(get(0, area + 512) & ~3ul) && !get(0, area + 520));
	for (uint64_t at = 576; at < 4000; at += 8) CHECK(get(0, area + at) == 0x5a5a5a5a);
	put(0, area + 512, 3);
	put(0, area + 160, 0x1234);
	CHECK(!call(0, RESTORE, area, 0, (uint64_t)&seen, &run) && run.function == 4 && seen.xmm == 0x1234 && kept(&seen));
	/* state that XFRM does not have, and a misaligned area: #GP; a page that is not there: #PF */
	put(0, area + 512, 4);
	CHECK(!call(0, RESTORE, area, 0, (uint64_t)&seen, &run) && run.function == 3 && run.vector == 13);
	/* that fault, seen by a handler, has nothing to do with executions that follow */
	put(0, area + 512, 3);
	CHECK(!call(1, RESTORE, area, 0, (uint64_t)&seen, &run) && run.function == 4 && seen.xmm == 0x1234 && kept(&seen));
	CHECK(!call(1, SAVE, area + 8, 0, (uint64_t)&seen, &run) && run.function == 3 && run.vector == 13);
}

static volatile int handled;
static void count_signal(int n) { (void)n; handled++; }

/* Areas in a few pages are saved and restored again and again, while signals and faults come. */
static void states(void)
{
	struct run run;
	struct seen seen;
	build();
	signal(SIGUSR1, count_signal);
	for (int round = 0; round < number; round++) {
		uint64_t area = data + (round % 17 + 1) * PAGE - (round & 1 ? 512 : 64 * (round % 60 + 9)), wanted = 0x1234 + round;
		for (uint64_t at = 512; at < 576; at += 8) put(0, area + at, 0);
		CHECK(!call(0, SAVE, area, 0, (uint64_t)&seen, &run) && run.function == 4 && kept(&seen));
		CHECK(!(get(0, area + 512) & ~3ul) && !get(0, area + 520));
		put(0, area + 512, 3);
		put(0, area + 160, wanted);
		put(0, area + 24, 0x1f80);
		CHECK(!call(0, RESTORE, area, 0, (uint64_t)&seen, &run) && run.function == 4 && seen.xmm == wanted && kept(&seen));
	}
	CHECK(handled);
}

/* RDTSC or RDTSCP, by number: executed on machines with SGX2. */
static void ticks(void)
{
	struct run run;
	build();
	CHECK(!call(0, RDTSC + number, 0, 0, 0, &run) && run.function == 4);
}

/* Vector registers go into the frame, are gone outside, and come back. */
static void vector(void)
{
	const uint64_t secret = 0x1122334455667788;
	struct run run;
	uint64_t back = 0, frame;
	build();
	frame = SSA_FRAME(0);
	CHECK(!call(0, VECTOR, 0, secret, (uint64_t)&back, &run) && run.function == 3 && run.vector == 6);
	CHECK(get(0, frame + 160) == secret && (get(0, frame + 512) & 2));
	put(0, GPR(frame) + RIP, get(0, GPR(frame) + RIP) + 2);
	put(0, frame + 160, secret + 1);
	CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
	CHECK(back == secret + 1);
	catch();
	CHECK(SIGNAL(raw_enter(base, 0, secret, VECTOR, (uint64_t)&back)) == SIGILL);
	CHECK(seen_xmm0 == 0 && seen_rip == (uint64_t)raw_aep);
}

/* An enclave grows until there is no room for its pages: SIGBUS, for it alone. */
static void drown(void)
{
	struct run run;
	uint64_t result, info, page;
	int lost = 0;
	build();
	info = data + (data_pages - 1) * PAGE;
	page = data + data_pages * PAGE;
	CHECK(mmap((void *)page, base + size - page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
	put(0, info, 0x20b);
	catch();
	for (; page < base + size && !lost; page += PAGE) {
		lost = SIGNAL(raw_enter(base, page, info, ACCEPT, (uint64_t)&result));
		if (!lost) lost = SIGNAL(raw_enter(base, page, page, PUT, 0));
	}
	page -= PAGE;
	CHECK(lost == SIGBUS && told.si_code == BUS_ADRERR && (uint64_t)told.si_addr == page);
	CHECK(seen_rip == (uint64_t)raw_aep && seen_rax == 3);
	/* the same through the vDSO is an exception like any other, at EENTER if its TCS is not there */
	CHECK(!call(1, PUT, page, 1, 0, &run) && (run.function == 3 || run.function == 2) && run.vector == 14);
	signal(SIGBUS, SIG_DFL);
	raw_enter(base + PAGE, page, 1, PUT, 0);
}

static void drowns(void)
{
	int status;
	build();
	fill();
	pid_t child = fork();
	if (!child) { close(device); munmap((void *)base, size); drown(); _exit(9); }
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	check_untouched();
	fill();
	check_untouched();
}

#define CREATE 0x4008a400
#define ADD 0xc030a401
#define INIT 0x4008a402
#define PROVISION 0x4008a403
#define RESTRICT 0xc028a405
#define MODIFY 0xc028a406
#define REMOVE 0xc018a407
#define REFUSED(command, argument, wanted) ({ errno = 0; int ret_ = ioctl(fd, command, argument); \
	if (ret_ != -1 || errno != (wanted)) { fprintf(stderr, "%d: %s: %d, errno %d, not %d\n", __LINE__, #command, ret_, errno, wanted); exit(1); } })
#define REFUSED_ADD(wanted, ...) ({ uint64_t add_[6] = {__VA_ARGS__}; REFUSED(ADD, add_, wanted); })

/* What a driver is asked that it must refuse, and with which errno. */
static void refusals(void)
{
	static uint8_t secs[PAGE] __attribute__((aligned(4096))), sig[PAGE] __attribute__((aligned(4096)));
	static uint8_t info[64] __attribute__((aligned(64))), page[2 * PAGE] __attribute__((aligned(4096)));
	uint64_t unmapped, kernel = 0xffff800000000000, odd = 0x123, s = 2 * PAGE * 8;
	int fd = open("/dev/sgx_enclave", O_RDWR);
	unmapped = (uint64_t)mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t at = (uint64_t)mmap(NULL, 2 * s, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	at = (at + s - 1) & -s;
	*(uint64_t *)info = 0x203;

	/* nothing is created yet */
	REFUSED_ADD(EINVAL, (uint64_t)page, 0, PAGE, (uint64_t)info, 0, 0);
	uint64_t sigstruct = (uint64_t)sig;
	REFUSED(INIT, &sigstruct, EINVAL);
	/* pointers to nowhere, to where nothing may be read, to the kernel */
	REFUSED(CREATE, (void *)0, EFAULT);
	REFUSED(CREATE, (void *)unmapped, EFAULT);
	REFUSED(CREATE, (void *)kernel, EFAULT);
	REFUSED(CREATE, &unmapped, EFAULT);
	REFUSED(CREATE, &kernel, EFAULT);
	REFUSED(CREATE, &odd, EFAULT);
	uint64_t src = (uint64_t)secs;
	*(uint64_t *)secs = s + PAGE; *(uint64_t *)(secs + 8) = at; *(uint32_t *)(secs + 16) = 1;
	*(uint64_t *)(secs + 48) = 4; *(uint64_t *)(secs + 56) = 3;
	REFUSED(CREATE, &src, EINVAL); /* no power of two */
	*(uint64_t *)secs = s; *(uint64_t *)(secs + 8) = at + PAGE;
	REFUSED(CREATE, &src, EIO); /* ECREATE faults: not aligned */
	*(uint64_t *)(secs + 8) = at;
	CHECK(!ioctl(fd, CREATE, &src));
	REFUSED(CREATE, &src, EINVAL);

	REFUSED(ADD, (void *)0, EFAULT);
	REFUSED_ADD(EINVAL, (uint64_t)page + 1, 0, PAGE, (uint64_t)info, 0, 0);
	REFUSED_ADD(EINVAL, (uint64_t)page, 1, PAGE, (uint64_t)info, 0, 0);
	REFUSED_ADD(EINVAL, (uint64_t)page, 0, 0, (uint64_t)info, 0, 0);
	REFUSED_ADD(EINVAL, (uint64_t)page, 0, PAGE + 1, (uint64_t)info, 0, 0);
	REFUSED_ADD(EINVAL, (uint64_t)page, s, PAGE, (uint64_t)info, 0, 0);
	REFUSED_ADD(EINVAL, (uint64_t)page, -PAGE, 2 * PAGE, (uint64_t)info, 0, 0);
	REFUSED_ADD(EFAULT, (uint64_t)page, 0, PAGE, unmapped, 0, 0);
	REFUSED_ADD(EFAULT, (uint64_t)page, 0, PAGE, kernel, 0, 0);
	REFUSED_ADD(EFAULT, unmapped, 0, PAGE, (uint64_t)info, 0, 0);
	REFUSED_ADD(EFAULT, PAGE, 0, PAGE, (uint64_t)info, 0, 0);
	static const uint64_t bad[] = {0x003, 0x303, 0x403, 0x202, 0x103, 0x20b, 0x213};
	for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
		*(uint64_t *)info = bad[i];
		REFUSED_ADD(EINVAL, (uint64_t)page, 0, PAGE, (uint64_t)info, 0, 0);
	}
	*(uint64_t *)info = 0x203; info[63] = 1;
	REFUSED_ADD(EINVAL, (uint64_t)page, 0, PAGE, (uint64_t)info, 0, 0);
	info[63] = 0;
	/* the second page's source is not there: one page is done, and told */
	char *half = mmap(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(!munmap(half + PAGE, PAGE));
	uint64_t partly[6] = {(uint64_t)half, 0, 2 * PAGE, (uint64_t)info, 0, 0};
	REFUSED(ADD, partly, EFAULT);
	CHECK(partly[5] == PAGE);
	REFUSED_ADD(EBUSY, (uint64_t)page, 0, PAGE, (uint64_t)info, 0, 0);
	/* the request itself cannot be written back */
	uint64_t *readonly = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(readonly, (uint64_t[]){(uint64_t)page, PAGE, PAGE, (uint64_t)info, 0, 0}, 48);
	CHECK(!mprotect(readonly, PAGE, PROT_READ));
	REFUSED(ADD, readonly, EFAULT);
	*(uint64_t *)info = 0x101; /* TCS with a right */
	REFUSED_ADD(EINVAL, (uint64_t)page, 2 * PAGE, PAGE, (uint64_t)info, 0, 0);
	*(uint64_t *)info = 0x100;
	page[PAGE - 1] = 1; /* a TCS with reserved bytes: EADD faults */
	REFUSED_ADD(EIO, (uint64_t)page, 2 * PAGE, PAGE, (uint64_t)info, 0, 0);

	/* SIGSTRUCT: not there, of nobody, of garbage, altered, of another enclave */
	REFUSED(INIT, (void *)0, EFAULT);
	REFUSED(INIT, &unmapped, EFAULT);
	*(uint32_t *)(sig + 16) = 0x1234;
	REFUSED(INIT, &sigstruct, EINVAL);
	memset(sig, 0, sizeof sig);
	REFUSED(INIT, &sigstruct, EPERM);
	FILE *f = fopen(file, "rb");
	CHECK(f && !fseek(f, 16, SEEK_SET) && fread(sig, 1808, 1, f) == 1);
	fclose(f);
	REFUSED(INIT, &sigstruct, EPERM);
	sig[600] ^= 1;
	REFUSED(INIT, &sigstruct, EPERM);

	uint64_t nowhere = 1000;
	REFUSED(PROVISION, &nowhere, EINVAL);
	uint64_t itself = fd;
	REFUSED(PROVISION, &itself, EINVAL);
	/* SGX2 requests before INIT */
	uint64_t request[5] = {0, PAGE, 1, 0, 0};
	REFUSED(RESTRICT, request, EINVAL);
	REFUSED(MODIFY, request, EINVAL);
	REFUSED(REMOVE, request, EINVAL);
	REFUSED(0xa404, request, ENOTTY);
	REFUSED(0x4008a4ff, request, ENOTTY);

	build();
	fd = device;
	REFUSED_ADD(EINVAL, (uint64_t)page, 0, PAGE, (uint64_t)info, 0, 0);
	REFUSED(INIT, &sigstruct, EINVAL);
	memcpy(request, (uint64_t[]){data - base, PAGE, 8, 0, 0}, sizeof request);
	REFUSED(RESTRICT, request, EINVAL);
	memcpy(request, (uint64_t[]){data - base, PAGE, 2, 0, 0}, sizeof request);
	REFUSED(RESTRICT, request, EINVAL); /* W without R */
	memcpy(request, (uint64_t[]){size, PAGE, 1, 0, 0}, sizeof request);
	REFUSED(RESTRICT, request, EINVAL);
	memcpy(request, (uint64_t[]){data - base, PAGE, 2, 0, 0}, sizeof request);
	REFUSED(MODIFY, request, EINVAL); /* to REG */
	memcpy(request, (uint64_t[]){data - base, PAGE, 0}, 24);
	REFUSED(REMOVE, request, EPERM); /* not trimmed */
	REFUSED(RESTRICT, (void *)kernel, EFAULT);
	CHECK(mmap((void *)base, PAGE, 7, MAP_SHARED | MAP_FIXED, device, 0) == MAP_FAILED && errno == EACCES);
	CHECK(mmap((void *)(base + size), PAGE, 1, MAP_SHARED | MAP_FIXED, device, 0) == MAP_FAILED && errno == EACCES);
	CHECK(mprotect((void *)CODE, PAGE, 7) == -1 && errno == EACCES);
	put(0, data, 5);
	CHECK(get(0, data) == 5);
}

/* Calls of one process while another's faults take pages from it: each is made once. */
static void calls(void)
{
	struct stat st;
	int status, pipes[2];
	char byte;
	build();
	fill();
	CHECK(!pipe(pipes));
	pid_t child = fork();
	if (!child) {
		close(pipes[1]);
		fcntl(pipes[0], F_SETFL, O_NONBLOCK);
		while (read(pipes[0], &byte, 1) < 0) {
			CHECK(!stat("/", &st));
			CHECK(get(1, data + PAGE) == 2);
		}
		_exit(0);
	}
	for (int i = 0; i < 30; i++) check_untouched();
	close(pipes[1]);
	CHECK(waitpid(child, &status, 0) == child && !status);
}

/* Says it is ready, then waits to be ended in whatever way. */
static void sit(void)
{
	struct run run;
	build();
	fill();
	printf("ready %d\n", getpid());
	fflush(stdout);
	for (;;) {
		CHECK(!call(0, SPIN, 1000000, 0, 0, &run));
		check_untouched();
	}
}

/* A recognisable secret on every page; pages come and go. */
static void secrets(void)
{
	for (int round = 0; round < 2; round++) {
		if (!round) build();
		for (uint64_t i = 0; i < data_pages; i++) {
			put(0, data + i * PAGE + 8 * i, 0x5345435245545f5f);
			put(0, data + i * PAGE + 8 * i + 8, 0x5f5f444554544e4c);
		}
	}
	for (uint64_t i = 0; i < data_pages; i++) CHECK(get(0, data + i * PAGE + 8 * i) == 0x5345435245545f5f);
}

static volatile sig_atomic_t alarms;
static void count_alarm(int number) { (void)number; alarms++; }

/* Signals while pages are added: with SA_RESTART (NUMBER 1) no call fails, and none is done twice. */
static void interrupted(void)
{
	static uint8_t secs[PAGE] __attribute__((aligned(4096))), info[64] __attribute__((aligned(64))), page[PAGE] __attribute__((aligned(4096)));
	struct itimerval soon = {{0, 0}, {0, 300}}, none = {{0}};
	struct sigaction action = {.sa_handler = count_alarm, .sa_flags = number ? SA_RESTART : 0};
	uint64_t pages = 4096, src = (uint64_t)secs, failed = 0;
	int fd = open("/dev/sgx_enclave", O_RDWR);
	*(uint64_t *)secs = pages * PAGE; *(uint64_t *)(secs + 8) = 1ul << 40; *(uint32_t *)(secs + 16) = 1;
	*(uint64_t *)(secs + 48) = 4; *(uint64_t *)(secs + 56) = 3;
	*(uint64_t *)info = 0x203;
	CHECK(!ioctl(fd, CREATE, &src));
	CHECK(!sigaction(SIGALRM, &action, NULL));
	int seen = -1; /* A page is added between two signals, however slow the machine is. */
	for (uint64_t i = 0; i < pages && (alarms < 100 || (!number && !failed)); i++) {
		uint64_t add[6] = {(uint64_t)page, i * PAGE, PAGE, (uint64_t)info, 0, 0};
		if (alarms != seen) { seen = alarms; CHECK(!setitimer(ITIMER_REAL, &soon, NULL)); }
		while (ioctl(fd, ADD, add)) {
			CHECK(errno == EINTR && !number && !add[5]);
			failed++;
		}
		CHECK(add[5] == PAGE);
	}
	CHECK(!setitimer(ITIMER_REAL, &none, NULL));
	CHECK(alarms && (number || failed));
}

/* Every other page is a mapping of its own; then NUMBER calls use two of them. */
static void patchwork(void)
{
	struct run run;
	build();
	fill();
	for (uint64_t i = 0; i < data_pages; i += 2) CHECK(!mprotect((void *)(data + i * PAGE), PAGE, PROT_READ));
	check_untouched();
	for (int i = 0; i < number; i++) {
		put(0, data + PAGE, i);
		CHECK(get(0, data + PAGE) == (uint64_t)i);
		CHECK(load(data + PAGE) == ONES);
	}
	put(0, data + PAGE, 2);
	CHECK(!call(0, PUT, data, 1, 0, &run) && run.function == 3 && run.vector == 14 && run.code == 7);
	check_untouched();
	CHECK(!mprotect((void *)data, data_pages * PAGE, PROT_READ | PROT_WRITE));
	fill();
	check_untouched();
}

static unsigned long locked_kib(void)
{
	unsigned long kib = ~0ul;
	char line[256];
	FILE *f = fopen("/proc/self/status", "r");
	while (f && fgets(line, sizeof line, f)) sscanf(line, "VmLck: %lu", &kib);
	CHECK(f && !fclose(f));
	return kib;
}

/* Servers lock all their memory, now and in future; an enclave has none of that. */
static void locked(void)
{
	unsigned long before = 0;
	if (number) CHECK(!mlockall(MCL_FUTURE));
	if (number) before = locked_kib();
	build();
	if (number) CHECK(locked_kib() - before < data_pages * 4);
	fill();
	CHECK(!mlockall(MCL_CURRENT | MCL_FUTURE));
	check_untouched();
	fill();
	check_untouched();
}

/* Pointers, lengths and descriptors that no program should pass; each call fails as without an enclave. */
static void wild(void)
{
	static const uint64_t at[] = {1, 0x7ffffffff000, 0x800000000000, 0xffff800000000000, ~0ul - 7, ~0ul};
	char buffer[256];
	build();
	fill();
	for (unsigned i = 0; i < sizeof at / sizeof *at; i++) {
		char *p = (char *)at[i];
		CHECK(open(p, O_RDWR) == -1 && errno == EFAULT);
		CHECK(openat(AT_FDCWD, p, O_RDWR) == -1 && errno == EFAULT);
		CHECK(syscall(SYS_openat2, AT_FDCWD, "/dev/sgx_enclave", p, 24) == -1 && errno == EFAULT);
		CHECK(access(p, 0) == -1 && errno == EFAULT);
		CHECK(syscall(SYS_stat, p, buffer) == -1 && errno == EFAULT);
		CHECK(syscall(SYS_stat, "/dev/sgx_enclave", p) == -1 && errno == EFAULT);
		CHECK(syscall(SYS_fstat, device, p) == -1 && errno == EFAULT);
		CHECK(readlink(p, buffer, sizeof buffer) == -1 && errno == EFAULT);
		CHECK(ioctl(device, MODIFY, p) == -1 && errno == EFAULT);
		CHECK(ioctl(device, RESTRICT, p) == -1 && errno == EFAULT);
	}
	for (int shift = 0; shift < 17; shift++) {
		uint64_t length = -PAGE << shift;
		CHECK(mmap((void *)base, length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED && errno == ENOMEM);
		CHECK(mmap((void *)base, length, PROT_READ, MAP_SHARED | MAP_FIXED, device, 0) == MAP_FAILED);
		CHECK(munmap((void *)base, length) == -1 && errno == EINVAL);
		CHECK(mremap((void *)base, PAGE, length, MREMAP_MAYMOVE) == MAP_FAILED);
		CHECK(mremap(buffer, PAGE, length, MREMAP_MAYMOVE | MREMAP_FIXED, base) == MAP_FAILED);
	}
	/* what fails has replaced nothing */
	CHECK(mmap((void *)base, size, PROT_READ, MAP_PRIVATE | MAP_FIXED, 1000, 0) == MAP_FAILED && errno == EBADF);
	check_untouched();
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"ones", ones}, {"fast", fast}, {"spies", spies}, {"neighbours", neighbours}, {"children", children},
		{"illegal", illegal}, {"vector", vector}, {"state", state}, {"states", states}, {"ticks", ticks}, {"drowns", drowns}, {"refusals", refusals}, {"calls", calls}, {"sit", sit}, {"secrets", secrets}, {"locked", locked}, {"wild", wild},
		{"interrupted", interrupted}, {"patchwork", patchwork},
	};
	CHECK(argc >= 3);
	file = argv[1]; enter = find_enter();
	number = argc > 3 ? atoi(argv[3]) : 0;
	CHECK(enter);
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(argv[2], all[i].name)) { all[i].go(); return 0; }
	return 2;
}
