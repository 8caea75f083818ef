/* crossings ENCLAVE [WAY:]MODE NUMBER: what a thread has inside and behind EEXIT. */
#include "sgx.h"
#include "ways.h"

/* What enclave code finds, and what is there behind EEXIT: everything in registers but XMM0-15. */
enum { INSIDE = 18, OUTSIDE = 19, PROBED = 4, WORDS = INSIDE + OUTSIDE + PROBED };
uint64_t record[WORDS], kept_rsp;
void cross(uint64_t seed, enter_t *fn, struct run *run);
/* RUN executes `inside` as enclave code; it goes on at the enclave's EEXIT, behind what scrubs. */
__asm__(".text\ncross:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n sub $8,%rsp\n"
	" mov %rsp,kept_rsp(%rip)\n mov %edi,%eax\n and $1,%eax\n shl $6,%eax\n sub %rax,%rsp\n mov %rsi,%rax\n push %rdx\n push %rdx\n"
	" lea 1(%rdi),%rsi\n lea 2(%rdi),%r9\n lea 3(%rdi),%r10\n lea 4(%rdi),%r11\n lea 5(%rdi),%r12\n"
	" lea 6(%rdi),%r13\n lea 7(%rdi),%r14\n mov %rdi,%r15\n lea 8(%rdi),%rbp\n lea 9(%rdi),%rbx\n"
	" lea record(%rip),%r8\n lea inside(%rip),%rdi\n mov $11,%edx\n mov $2,%ecx\n"
	" mov %rax,%r11\n test $1,%r15b\n jz 1f\n mov $0xd77f,%eax\n add $1,%al\n sahf\n std\n call *%r11\n ud2\n" /* a step over POPF would set TF */
	"1: mov $0x0200,%eax\n add $0,%al\n sahf\n cld\n call *%r11\n ud2\n"
	"inside:\n mov %rax,(%r8)\n mov %rbx,8(%r8)\n mov %rcx,16(%r8)\n mov %rsp,24(%r8)\n mov %rbp,32(%r8)\n"
	" mov %rsi,40(%r8)\n mov %rdi,48(%r8)\n mov %r9,56(%r8)\n mov %r10,64(%r8)\n mov %r12,72(%r8)\n"
	" mov %r13,80(%r8)\n mov %r14,88(%r8)\n mov %r15,96(%r8)\n rdfsbase %rax\n mov %rax,104(%r8)\n"
	" rdgsbase %rax\n mov %rax,112(%r8)\n mov 3*4096-40(%rbx),%rax\n mov %rax,120(%r8)\n"
	" mov 3*4096-32(%rbx),%rax\n mov %rax,128(%r8)\n mov %r8,136(%r8)\n"
	" add $7,%r11\n lea outside(%rip),%rbx\n mov %r15,%rdx\n not %rdx\n mov %rdx,%rcx\n lea 1(%rdx),%rsi\n"
	" lea 2(%rdx),%rdi\n lea 3(%rdx),%r9\n lea 4(%rdx),%r10\n lea 5(%rdx),%r12\n lea 6(%rdx),%r13\n"
	" lea 7(%rdx),%rbp\n test $1,%r15b\n jz 1f\n mov $0x0200,%eax\n add $0,%al\n sahf\n cld\n jmp *%r11\n"
	"1: mov $0xd77f,%eax\n add $1,%al\n sahf\n std\n jmp *%r11\n"
	"outside:\n lea record(%rip),%r8\n mov %rax,144(%r8)\n mov %rbx,152(%r8)\n mov %rcx,160(%r8)\n mov %rdx,168(%r8)\n"
	" mov %rsi,176(%r8)\n mov %rdi,184(%r8)\n mov %rbp,192(%r8)\n mov %rsp,200(%r8)\n mov %r9,208(%r8)\n"
	" mov %r10,216(%r8)\n mov %r11,224(%r8)\n mov %r12,232(%r8)\n mov %r13,240(%r8)\n mov %r14,248(%r8)\n"
	" mov %r15,256(%r8)\n rdfsbase %rax\n mov %rax,264(%r8)\n rdgsbase %rax\n mov %rax,272(%r8)\n"
	" pushfq\n pop %rax\n and $~0x100,%rax\n mov %rax,280(%r8)\n cld\n"
	" mov kept_rsp(%rip),%rsp\n add $8,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

/* R10, R11, RAX and RCX as EENTER leaves them. */
void probe(uint64_t seed, enter_t *fn, struct run *run);
__asm__(".text\nprobe:\n push %rbp\n push %rbx\n push %rdx\n push %rdx\n push %rdx\n mov %rsi,%rax\n lea record+8*37(%rip),%r8\n"
	" lea 3(%rdi),%r10\n lea 4(%rdi),%r11\n mov $10,%edx\n mov $2,%ecx\n call *%rax\n add $24,%rsp\n pop %rbx\n pop %rbp\n ret\n");

static uint64_t handled;
static void noted(int number) { handled++; }
/* Each crossing is as the first one of its kind was, whose EENTER stops; the ways take turns. */
static void same(uint64_t count, enter_t **turns, uint64_t kinds, int blocks)
{
	uint64_t first[8][WORDS];
	struct sigaction action = {.sa_handler = noted};
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	build();
	for (uint64_t i = 0; i < count; i++) {
		struct run run = {.tcs = base};
		double x = 1.5, y;
		uint64_t kind = i % (2 * kinds), seed = 0x1122334455667780 + kind / kinds;
		if (i < 2 * kinds) munmap(NULL, 0); /* ends permits to enter */
		memset(record, 0, sizeof record);
		__asm__ volatile("wrgsbase %0" : : "r"(0x123456789000 + (kind << 12)));
		__asm__ volatile("movq %0, %%xmm15" : : "r"(i) : "xmm15");
		sigset_t set, now;
		sigemptyset(&set);
		if (blocks) { /* a signal of faults: such an entry stops */
			sigaddset(&set, SIGFPE);
			CHECK(!sigprocmask(i % 4 < 2 ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL));
		}
		cross(seed, turns[kind % kinds], &run);
		probe(seed, turns[kind % kinds], &run);
		CHECK(!call(0, SPIN, 3, 0, 0, &run) && run.function == 4); /* by another EEXIT */
		CHECK(!sigprocmask(SIG_BLOCK, NULL, &now) && sigismember(&now, SIGFPE) == (blocks && i % 4 < 2));
		__asm__ volatile("movq %%xmm15, %0" : "=r"(*(uint64_t *)&y));
		CHECK(*(uint64_t *)&y == i && x == 1.5);
		if (i < 2 * kinds) memcpy(first[i], record, sizeof record);
		for (int word = 0; word < WORDS; word++)
			if (record[word] != first[kind][word]) {
				fprintf(stderr, "crossing %lu: word %d is %lx, not %lx\n", i, word, record[word], first[kind][word]);
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

/* Two enclaves whose TCSs have the same place in a list of permits. */
static void twins(uint64_t count)
{
	uint64_t bases[2], words[2], value;
	struct run run;
	for (uint64_t n = 0; n < 2; n++) {
		hint = (void *)(0x500000000 + n * 0x10000000);
		build();
		CHECK(base == (uint64_t)hint);
		bases[n] = base, words[n] = data;
	}
	for (uint64_t i = 0; i < count; i++)
		for (int n = 0; n < 2; n++) {
			base = bases[n];
			CHECK(!call(0, PUT, words[n], 2 * i + n, 0, &run) && run.function == 4);
			CHECK(!call(0, GET, words[n], 0, (uint64_t)&value, &run) && run.function == 4 && value == 2 * i + n);
		}
}

/* EENTER with an AEP that is not canonical is #GP at the ENCLU, also where it has not stopped. */
static sigjmp_buf back;
static void failed(int number) { siglongjmp(back, number); }
static void noncanonical(void)
{
	struct sigaction action = {.sa_handler = failed};
	struct run run;
	CHECK(!sigaction(SIGSEGV, &action, NULL));
	build();
	enter = any;
	for (volatile int round = 0; round < 3; round++) {
		any_aep = (uint64_t)own_aep;
		for (int i = 0; i < 50; i++) CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 4);
		any_aep = 0x800000000000;
		int number = sigsetjmp(back, 1);
		if (!number) {
			call(0, NOP, 0, 0, 0, &run);
			CHECK(0);
		}
		CHECK(number == SIGSEGV);
	}
}

int main(int argc, char **argv)
{
	CHECK(argc > 3);
	file = argv[1];
	enter = find_way(&argv[2]);
	CHECK(enter);
	enter_t *turns[] = {own, gap, far, find_enter()};
	if (!strcmp(argv[2], "low")) where = MAP_32BIT, argv[2] = "same";
	if (!strcmp(argv[2], "same")) same(strtoul(argv[3], NULL, 0), &enter, 1, 0);
	else if (!strcmp(argv[2], "blocked")) same(strtoul(argv[3], NULL, 0), &enter, 1, 1);
	else if (!strcmp(argv[2], "noncanonical")) noncanonical();
	else if (!strcmp(argv[2], "twins")) twins(strtoul(argv[3], NULL, 0));
	else if (!strcmp(argv[2], "mixed")) same(strtoul(argv[3], NULL, 0), turns, 4, 0);
	else if (!strcmp(argv[2], "astray")) astray();
	else if (!strcmp(argv[2], "spoil")) spoil();
	else go_on();
	return 0;
}
