/* host FILE MODE …: what a thread has inside and behind EEXIT, and how often threads cross. */
#include "sgx.h"
#include <sched.h>

/* What enclave code finds, and what is there behind EEXIT: everything in registers but XMM0-15. */
enum { INSIDE = 18, OUTSIDE = 19, WORDS = INSIDE + OUTSIDE };
uint64_t record[WORDS], kept_rsp;
void cross(uint64_t seed, enter_t *fn, struct run *run);
/* RUN executes `inside` as enclave code; it goes on at the enclave's EEXIT, behind what scrubs. */
__asm__(".text\ncross:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n sub $8,%rsp\n"
	" mov %rsp,kept_rsp(%rip)\n mov %edi,%eax\n and $1,%eax\n shl $6,%eax\n sub %rax,%rsp\n mov %rsi,%rax\n push %rdx\n push %rdx\n"
	" lea 1(%rdi),%rsi\n lea 2(%rdi),%r9\n lea 3(%rdi),%r10\n lea 4(%rdi),%r11\n lea 5(%rdi),%r12\n"
	" lea 6(%rdi),%r13\n lea 7(%rdi),%r14\n mov %rdi,%r15\n lea 8(%rdi),%rbp\n lea 9(%rdi),%rbx\n"
	" lea record(%rip),%r8\n lea inside(%rip),%rdi\n mov $11,%edx\n mov $2,%ecx\n call *%rax\n ud2\n"
	"inside:\n mov %rax,(%r8)\n mov %rbx,8(%r8)\n mov %rcx,16(%r8)\n mov %rsp,24(%r8)\n mov %rbp,32(%r8)\n"
	" mov %rsi,40(%r8)\n mov %rdi,48(%r8)\n mov %r9,56(%r8)\n mov %r10,64(%r8)\n mov %r12,72(%r8)\n"
	" mov %r13,80(%r8)\n mov %r14,88(%r8)\n mov %r15,96(%r8)\n rdfsbase %rax\n mov %rax,104(%r8)\n"
	" rdgsbase %rax\n mov %rax,112(%r8)\n mov 3*4096-40(%rbx),%rax\n mov %rax,120(%r8)\n"
	" mov 3*4096-32(%rbx),%rax\n mov %rax,128(%r8)\n mov %r8,136(%r8)\n"
	" add $7,%r11\n lea outside(%rip),%rbx\n mov %r15,%rdx\n not %rdx\n mov %rdx,%rcx\n lea 1(%rdx),%rsi\n"
	" lea 2(%rdx),%rdi\n lea 3(%rdx),%r9\n lea 4(%rdx),%r10\n lea 5(%rdx),%r12\n lea 6(%rdx),%r13\n"
	" lea 7(%rdx),%rbp\n test $1,%r15b\n jz 1f\n pushq $0x202\n popfq\n jmp *%r11\n1: pushq $0xed7\n popfq\n jmp *%r11\n"
	"outside:\n lea record(%rip),%r8\n mov %rax,144(%r8)\n mov %rbx,152(%r8)\n mov %rcx,160(%r8)\n mov %rdx,168(%r8)\n"
	" mov %rsi,176(%r8)\n mov %rdi,184(%r8)\n mov %rbp,192(%r8)\n mov %rsp,200(%r8)\n mov %r9,208(%r8)\n"
	" mov %r10,216(%r8)\n mov %r11,224(%r8)\n mov %r12,232(%r8)\n mov %r13,240(%r8)\n mov %r14,248(%r8)\n"
	" mov %r15,256(%r8)\n rdfsbase %rax\n mov %rax,264(%r8)\n rdgsbase %rax\n mov %rax,272(%r8)\n"
	" pushfq\n pop %rax\n and $~0x100,%rax\n mov %rax,280(%r8)\n cld\n"
	" mov kept_rsp(%rip),%rsp\n add $8,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

static uint64_t handled;
static void noted(int number) { handled++; }
/* Each crossing is as the first one of its kind was. */
static void same(uint64_t count)
{
	uint64_t first[2][WORDS];
	struct sigaction action = {.sa_handler = noted};
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	build();
	__asm__ volatile("wrgsbase %0" : : "r"(0x123456789000ul));
	for (uint64_t i = 0; i < count; i++) {
		struct run run = {.tcs = base};
		double x = 1.5, y;
		memset(record, 0, sizeof record);
		__asm__ volatile("movq %0, %%xmm15" : : "r"(i) : "xmm15");
		cross(0x1122334455667780 + (i & 1), enter, &run);
		CHECK(!call(0, SPIN, 3, 0, 0, &run) && run.function == 4); /* by another EEXIT */
		__asm__ volatile("movq %%xmm15, %0" : "=r"(*(uint64_t *)&y));
		CHECK(*(uint64_t *)&y == i && x == 1.5);
		if (i < 2) memcpy(first[i], record, sizeof record);
		for (int word = 0; word < WORDS; word++)
			if (record[word] != first[i & 1][word]) {
				fprintf(stderr, "crossing %lu: word %d is %lx, not %lx\n", i, word, record[word], first[i & 1][word]);
				exit(1);
			}
	}
	printf("%lu %lu\n", count, handled);
}

/* An EEXIT to nowhere is #GP inside, also where calls have gone on without a stop before. */
extern char stray[];
__asm__(".text\nstray:\n mov $0x800000000000,%rbx\n add $7,%r11\n jmp *%r11\n");
static void astray(void)
{
	struct run run;
	build();
	for (int i = 0; i < 100; i++) CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 4);
	CHECK(!call(0, RUN, (uint64_t)stray, 0, 0, &run));
	CHECK(run.function == 3 && run.vector == 13);
}

/* A program that spoils its table of permits, says so, and stops no more. */
static void spoil(void)
{
	struct run run;
	build();
	for (int i = 0; i < 3; i++) CHECK(!call(0, NOP, 0, 0, 0, &run));
	unsigned long at = 0, end;
	char line[300], name[300];
	FILE *maps = fopen("/proc/self/maps", "r");
	while (fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%lx %*s %*s %*s %*s %299s", &at, &end, name) == 3 && at < 1ul << 31 && strstr(name, "memfd:softsgx")) break;
	CHECK(at && at < 1ul << 31);
	for (int i = 0; i < 9; i++) CHECK(!call(0, NOP, 0, 0, 0, &run));
	for (int slot = 0; slot < 8; slot++)
		*(volatile uint64_t *)(at + (1 << 20) + 256 * slot) = 3 | 77 << 3 | 2 << 25; /* thread 77 is inside */
	alarm(60);
	CHECK(write(1, "!", 1) == 1);
	for (;;);
}

/* Another program that starts calls when the first has done that. */
static void go_on(void)
{
	struct run run;
	char byte;
	build();
	CHECK(read(0, &byte, 1) == 1);
	for (int i = 0; i < 100; i++) CHECK(!call(0, NOP, 0, 0, 0, &run));
}

/* Threads that come and go, each with a TCS, make calls; timers and each other interrupt them. */
static uint64_t made[64], calls_of_each;
static pthread_t crowd[64];
static void *caller(void *arg)
{
	uint64_t n = (uint64_t)arg;
	struct run run;
	for (uint64_t i = 0; i < calls_of_each; i++) {
		CHECK(!call(n, PUT, data + i % data_pages * PAGE + 8 * n, i, 0, &run) && run.function == 4);
		made[n]++;
		if (i % 1024 == 0) pthread_kill(pthread_self(), SIGUSR1);
	}
	return NULL;
}
static void many(uint64_t threads, uint64_t rounds, uint64_t calls)
{
	struct sigaction action = {.sa_handler = noted, .sa_flags = SA_RESTART};
	struct itimerval timer = {{0, 900}, {0, 900}}, stop = {{0}};
	uint64_t sum = 0;
	calls_of_each = calls;
	build();
	CHECK(!sigaction(SIGUSR1, &action, NULL) && !sigaction(SIGALRM, &action, NULL));
	setitimer(ITIMER_REAL, &timer, NULL);
	for (uint64_t round = 0; round < rounds; round++) {
		for (uint64_t n = 0; n < threads; n++) CHECK(!pthread_create(&crowd[n], NULL, caller, (void *)n));
		for (uint64_t n = 0; n < threads; n++) CHECK(!pthread_join(crowd[n], NULL));
	}
	setitimer(ITIMER_REAL, &stop, NULL);
	for (uint64_t n = 0; n < threads; n++) sum += made[n];
	CHECK(sum == threads * rounds * calls);
	printf("%lu %lu\n", sum, handled);
}

/* Processes whose threads make calls until they are killed; what each has begun, and ended. */
static volatile uint64_t (*lives)[2];
static void *endless(void *arg)
{
	uint64_t n = (uint64_t)arg, who = n % 2;
	volatile uint64_t *mine = lives[n];
	struct run run;
	for (uint64_t i = 0;; i++) {
		mine[0]++;
		CHECK(!call(who, PUT, data + i % data_pages * PAGE + 8 * who, i, 0, &run) && run.function == 4);
		mine[1]++;
	}
}
static void killed(uint64_t processes, uint64_t least)
{
	uint64_t begun = 0, ended = 0;
	int status;
	lives = mmap(NULL, processes * 32, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(lives != MAP_FAILED);
	for (uint64_t i = 0; i < processes; i++) {
		pid_t child = fork();
		CHECK(child >= 0);
		if (!child) {
			pthread_t other;
			build();
			CHECK(!pthread_create(&other, NULL, endless, (void *)(2 * i + 1)));
			endless((void *)(2 * i));
		}
		while (lives[2 * i][1] < least + 37 * i || lives[2 * i + 1][1] < least) sched_yield();
		CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child && WTERMSIG(status) == SIGKILL);
	}
	for (uint64_t n = 0; n < 2 * processes; n++) begun += lives[n][0], ended += lives[n][1];
	CHECK(begun - ended <= 2 * processes);
	printf("%lu %lu\n", begun, ended);
}

int main(int argc, char **argv)
{
	CHECK(argc > 3);
	uint64_t numbers[3] = {0};
	for (int i = 3; i < argc && i < 6; i++) numbers[i - 3] = strtoul(argv[i], NULL, 0);
	file = argv[1];
	enter = find_enter();
	CHECK(enter);
	if (!strcmp(argv[2], "same")) same(numbers[0]);
	else if (!strcmp(argv[2], "astray")) astray();
	else if (!strcmp(argv[2], "spoil")) spoil();
	else if (!strcmp(argv[2], "go_on")) go_on();
	else if (!strcmp(argv[2], "killed")) killed(numbers[0], numbers[1]);
	else many(numbers[0], numbers[1], numbers[2]);
	return 0;
}
