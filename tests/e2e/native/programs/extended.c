/* host FILE MODE …: instructions on extended state behind loads of constants, by all ways they are executed. */
#include "sgx.h"

enum { SAVE_RDI, RESTORE_RDI, COMPACT_RCX, RESTORE_RCX, OPTIMISED, NARROW_SAVE, NARROW_RESTORE, KINDS };
static const int restores[KINDS] = {0, 1, 0, 1, 0, 0, 1}, offset[KINDS] = {0, 0, 0, 0, 0, 64, 64};
static const uint64_t flags_of[] = {0x202, 0xad7, 0x203, 0xa02, 0xac6, 0x212};
enum { AREA = 1024, FLAGS = sizeof flags_of / sizeof *flags_of, VARIANTS = 3 * FLAGS };

struct seen {
	uint64_t nothing, rax, rcx, rdx, flags, r10, rdi, nothing_else;
	uint8_t fxsave[512] __attribute__((aligned(16)));
};
struct outcome { struct seen seen; uint8_t area[AREA]; };

static uint64_t handled, others; /* pages of data that are used before each execution */
static void noted(int number) { handled++; }

/* What the area has before: a pattern, and for XRSTOR state; and the thread's own state. */
static void prepare(int kind, int variant, uint8_t *area)
{
	for (int i = 0; i < AREA; i++) area[i] = i * 7 + variant;
	memset(area + 512, 0, 64);
	if (!restores[kind]) *(uint64_t *)(area + 512) = variant % 3 ? 0x1234 & ~3ul : 0; /* others' bits stay */
	if (!restores[kind]) return;
	*(uint16_t *)area = 0x27f + 0x100 * (variant % 3);
	*(uint32_t *)(area + 24) = 0x1f80 | (variant & 1) << 15;
	*(uint64_t *)(area + 512) = variant % 4;
	/* components that are not in the compacted form keep their initial state */
	if (variant % 2) *(uint64_t *)(area + 520) = 1ul << 63 | 3;
}

static void set_state(int variant)
{
	uint8_t state[512] __attribute__((aligned(16)));
	for (int i = 0; i < 512; i++) state[i] = i * 11 + variant;
	*(uint16_t *)state = 0x37f - 0x40 * (variant & 1);
	*(uint16_t *)(state + 2) = 0x3800 * (variant & 1);
	state[4] = variant % 3 ? 0xff >> (variant & 7) : 0;
	*(uint32_t *)(state + 24) = 0x1f80 | (variant & 3) << 13;
	__asm__ volatile("fxrstor64 %0" : : "m"(state));
}

static void perform(int kind, int variant, uint8_t *area, struct outcome *out)
{
	struct run run = {.tcs = base};
	uint8_t *real = area + offset[kind];
	prepare(kind, variant, real);
	for (uint64_t i = data_pages - others; i < data_pages; i++) (void)*(volatile uint8_t *)(data + i * PAGE);
	memset(out, 0, sizeof *out);
	set_state(variant);
	CHECK(!enter((uint64_t)area, flags_of[variant % FLAGS], MASKED + kind, 2, (uint64_t)&out->seen, 0, &run));
	__asm__ volatile("" : : : "rbx", "r12", "r13", "r14", "r15");
	__asm__ volatile("fninit\n ldmxcsr %0" : : "m"((uint32_t){0x1f80}));
	CHECK(run.function == 4);
	out->seen.flags &= ~0x100ul; /* of the test, which steps */
	memcpy(out->area, real, AREA);
}

/* Every execution is as the first of its kind, which has stopped. */
static void same(uint64_t rounds)
{
	static struct outcome first[KINDS][VARIANTS], out;
	struct sigaction action = {.sa_handler = noted};
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	build();
	uint64_t executed = 0;
	for (uint64_t round = 0; round < rounds; round++)
		for (int variant = 0; variant < VARIANTS; variant++)
			for (int kind = 0; kind < KINDS; kind++) {
				/* areas that cross pages; the address must be the same for the comparison */
				uint8_t *area = (uint8_t *)data + (1 + (kind + variant) % 8) * PAGE - 512 - 64 * (variant % 3);
				perform(kind, variant, area, &out);
				executed++;
				if (!round) { first[kind][variant] = out; continue; }
				if (!memcmp(&out, &first[kind][variant], sizeof out)) continue;
				for (unsigned i = 0; i < sizeof out; i++) {
					uint8_t a = ((uint8_t *)&out)[i], b = ((uint8_t *)&first[kind][variant])[i];
					if (a != b) fprintf(stderr, "round %lu kind %d variant %d: byte %u is %x, not %x\n", round, kind, variant, i, a, b);
				}
				exit(1);
			}
	printf("%lu %lu\n", executed, handled);
}

#define SSA_FRAME(thread) (base + 2 * PAGE + 2 * PAGE * (thread))
#define GPR(frame) ((frame) + PAGE - 184)
static uint8_t elsewhere[AREA] __attribute__((aligned(64)));
/* What the stub cannot do is as where no stub is: #GP inside, and areas in ordinary memory. */
static void refused(void)
{
	struct outcome out;
	build();
	uint8_t *area = (uint8_t *)data + PAGE - 512;
	for (int round = 0; round < 3; round++)
		for (int kind = 0; kind < KINDS; kind++) {
			for (int again = 0; again < 3; again++) perform(kind, 3 + again, area, &out);
			for (int bad = 0; bad < 5; bad++) {
				struct run run = {.tcs = base};
				struct seen seen;
				uint64_t at = (uint64_t)area, frame = SSA_FRAME(0), flags = flags_of[bad + 1];
				uint8_t *real = area + offset[kind];
				prepare(kind, 1, real);
				memset(real + 512, 0, 64);
				if (bad == 0) at += 8;
				else if (bad == 4) at = base + 7 * PAGE + 8; /* nothing is there: that it is misaligned comes first */
				else if (!restores[kind]) continue;
				else if (bad == 1) *(uint64_t *)(real + 512) = 4;
				else if (bad == 2) *(uint64_t *)(real + 520) = 1ul << 63 | 7;
				else *(uint64_t *)(real + 536) = 1, *(uint64_t *)(real + 520) = 1ul << 63 | 3;
				CHECK(!call(0, MASKED + kind, at, flags, (uint64_t)&seen, &run));
				CHECK(run.function == 3 && run.vector == 13);
				uint64_t gpr = GPR(frame), word[18];
				memcpy(word, (void *)gpr, sizeof word);
				printf("%d %d %d: rax %lx rcx %lx rdx %lx flags %lx rip %lx\n", round, kind, bad, word[0], word[1] - (kind == OPTIMISED ? 0 : base), word[2], word[16] & ~0x10000ul, word[17] - base);
				/* the next entry by this TCS: resume behind the instruction */
				static const int length[KINDS] = {4, 4, 4, 4, 6, 4, 4};
				*(uint64_t *)(gpr + 136) += length[kind];
				CHECK(!go(0, 3, 0, 0, 0, 0, &run) && run.function == 4);
			}
			if (kind == OPTIMISED) continue;
			prepare(kind, 2, elsewhere);
			struct run run = {.tcs = base};
			struct seen seen;
			if (!offset[kind]) {
				CHECK(!call(0, MASKED + kind, (uint64_t)elsewhere, 0x202, (uint64_t)&seen, &run) && run.function == 4);
				CHECK(restores[kind] || *(uint64_t *)(elsewhere + 512) & 2);
			}
		}
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	file = argv[1];
	enter = find_enter();
	CHECK(enter);
	if (!strcmp(argv[2], "same")) others = strtoul(argv[4], NULL, 0), same(strtoul(argv[3], NULL, 0));
	else refused();
	return 0;
}
