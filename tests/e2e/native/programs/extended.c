/* host FILE XFRM MODE …: instructions on extended state behind loads of constants, by all ways they are executed. */
#include "sgx.h"

enum { SAVE_RDI, RESTORE_RDI, COMPACT_RCX, RESTORE_RCX, OPTIMISED, NARROW_SAVE, NARROW_RESTORE, SOME_SAVE, SOME_RESTORE, BY_XOR, ON_STACK, KINDS };
static const int restores[KINDS] = {0, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0}, offset[KINDS] = {0, 0, 0, 0, 0, 64, 64, 64, 64, 0, 64};
static const uint64_t flags_of[] = {0x202, 0xad7, 0x203, 0xa02, 0xac6, 0x212};
/* Components of XFRM that an area has, and that are in use before; the kernel says of SSE that it always is. */
static const uint64_t held_of[] = {0, 0xe5, 2, 0xe7, 0x41, 0x26, 0x83, 0xe0, 7}, used_of[] = {3, 0xe7, 7, 0x67, 2};
enum { AREA = 3008, FLAGS = sizeof flags_of / sizeof *flags_of, VARIANTS = 3 * FLAGS, HELD = 9, USED = 5 };
/* What the tests look at: the components of AVX-512 and below. */
enum { ALL = 0xe7 };

struct seen {
	uint64_t nothing, rax, rcx, rdx, flags, r10, rdi, nothing_else;
	uint8_t fxsave[512] __attribute__((aligned(16)));
};
struct outcome { struct seen seen; uint8_t area[AREA], state[AREA] __attribute__((aligned(64))); };

static uint64_t handled, others; /* pages of data that are used before each execution */
static void noted(int number) { handled++; }

/* What the area has before: a pattern, and for XRSTOR state. */
static void prepare(int kind, int variant, uint8_t *area)
{
	uint64_t *header = (uint64_t *)(area + 512);
	for (int i = 0; i < AREA; i++) area[i] = i * 7 + (i >> 8) + variant;
	if (!restores[kind]) {
		header[0] = variant % 3 ? 0x12345a5a : 0; /* others' bits stay */
		return;
	}
	memset(header, 0, 64);
	*(uint16_t *)area = 0x27f + 0x100 * (variant % 3);
	*(uint32_t *)(area + 24) = 0x1f80 | (variant & 1) << 15;
	header[0] = held_of[variant % HELD] & xfrm;
	/* components that are not in the compacted form keep their initial state */
	if (variant % 2) header[1] = 1ul << 63 | (xfrm & (header[0] | 3));
}

/* The thread's own state, in the compacted form, which is the same on all processors. */
static void set_state(int variant)
{
	static uint8_t state[AREA] __attribute__((aligned(64)));
	memset(state, 0, sizeof state);
	for (int i = 0; i < 512; i++) state[i] = i * 11 + variant;
	for (int i = 576; i < AREA; i++) state[i] = i * 13 + (i >> 8) + variant;
	*(uint16_t *)state = 0x37f - 0x40 * (variant & 1);
	*(uint16_t *)(state + 2) = 0x3800 * (variant & 1);
	state[4] = variant % 3 ? 0xff >> (variant & 7) : 0;
	*(uint32_t *)(state + 24) = 0x1f80 | (variant & 3) << 13;
	((uint64_t *)(state + 512))[0] = used_of[variant % USED] & xfrm;
	((uint64_t *)(state + 512))[1] = 1ul << 63 | (ALL & xfrm);
	__asm__ volatile("xrstor64 %0" : : "m"(state), "a"(-1), "d"(-1));
}

static void perform(int kind, int variant, uint8_t *area, struct outcome *out)
{
	static const uint8_t initial[576] __attribute__((aligned(64))) = {[527] = 0x80};
	struct run run = {.tcs = base};
	uint8_t *real = area + offset[kind];
	int failed;
	prepare(kind, variant, real);
	for (uint64_t i = data_pages - others; i < data_pages; i++) (void)*(volatile uint8_t *)(data + i * PAGE);
	memset(out, 0, sizeof *out);
	set_state(variant);
	failed = enter((uint64_t)area, flags_of[variant % FLAGS], MASKED + kind, 2, (uint64_t)&out->seen, 0, &run);
	__asm__ volatile("xsavec64 %0" : "+m"(out->state) : "a"(ALL), "d"(0) : "rbx", "r12", "r13", "r14", "r15");
	__asm__ volatile("xrstor64 %0" : : "m"(initial), "a"(-1), "d"(-1));
	CHECK(!failed && run.function == 4);
	/* After a switch of threads x87, SSE and AVX may be in use in their initial state. */
	if (!(out->state[512] & 1)) *(uint16_t *)out->state = 0x37f;
	if (!(out->state[512] & 2)) *(uint32_t *)(out->state + 24) = 0x1f80;
	out->state[512] |= 7 & xfrm;
	memset(out->state + 28, 0, 4); /* MXCSR_MASK */
	out->seen.flags &= ~0x100ul; /* of the test, which steps */
	memcpy(out->area, real, AREA);
}

/* Every execution is as the first with the same state; those are written to a file. */
static void same(uint64_t rounds, const char *outcomes)
{
	static struct outcome first[KINDS][VARIANTS], out;
	FILE *written = fopen(outcomes, "wb");
	CHECK(written);
	struct sigaction action = {.sa_handler = noted};
	CHECK(!sigaction(SIGUSR1, &action, NULL));
	build();
	uint64_t executed = 0;
	for (uint64_t round = 0; round < rounds; round++)
		for (int variant = 0; variant < VARIANTS; variant++)
			for (int kind = 0; kind < KINDS; kind++) {
				/* areas that cross pages; the address must be the same for the comparison */
				uint8_t *area = (uint8_t *)data + (1 + (kind + variant) % 8) * PAGE - 512 - 64 * (variant % 3) - 1024 * (variant % 4);
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
	for (int kind = 0; kind < KINDS; kind++)
		for (int variant = 0; variant < VARIANTS; variant++) {
			struct seen *seen = &first[kind][variant].seen; /* without addresses, which differ between runs */
			if (kind != OPTIMISED) seen->rcx -= seen->rdi;
			seen->rdi = seen->r10 = 0;
		}
	CHECK(fwrite(first, sizeof first, 1, written) == 1 && !fclose(written));
	printf("%lu %lu\n", executed, handled);
}

/* COUNT times what a call of an SDK does with extended state, or one of a libOS. */
static void calls(uint64_t count, int compacted)
{
	struct run run = {.tcs = base};
	struct seen seen;
	build();
	uint8_t *area = (uint8_t *)data + 64;
	memset(area, 0, AREA);
	for (uint64_t i = 0; i < count; i++) {
		set_state(i % VARIANTS);
		CHECK(!call(0, MASKED + (compacted ? COMPACT_RCX : SAVE_RDI), (uint64_t)area, 0x202, (uint64_t)&seen, &run) && run.function == 4);
		CHECK(*(uint64_t *)(area + 512) == (used_of[i % VARIANTS % USED] & xfrm));
		CHECK(!call(0, MASKED + RESTORE_RCX, (uint64_t)area, 0x202, (uint64_t)&seen, &run) && run.function == 4);
		__asm__ volatile("fninit\n ldmxcsr %0" : : "m"((uint32_t){0x1f80}));
	}
}

#define SSA_FRAME(thread) (base + 2 * PAGE + 2 * PAGE * (thread))
#define GPR(frame) ((frame) + PAGE - 184)
static uint8_t elsewhere[AREA] __attribute__((aligned(64)));
/* Kinds that use moved components whatever is in use. */
static const int whole[KINDS] = {1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0};
/* What the stub cannot do is as where no stub is: #GP inside, and areas in ordinary memory. */
static void refused(void)
{
	struct outcome out;
	build();
	uint8_t *area = (uint8_t *)data + PAGE - 512;
	uint64_t foreign = xfrm & 4 ? 0x200 : 4;
	for (int round = 0; round < 3; round++)
		for (int kind = 0; kind < KINDS; kind++) {
			for (int again = 0; again < 3; again++) perform(kind, 3 + again, area, &out);
			for (int bad = 0; bad < 8; bad++) {
				struct run run = {.tcs = base};
				struct seen seen;
				uint64_t at = (uint64_t)area, frame = SSA_FRAME(0), flags = flags_of[(bad + 1) % FLAGS];
				if (bad == 6 && (!(xfrm & 0xe0) || !whole[kind])) continue;
				if (bad == 5 && kind == NARROW_RESTORE) continue; /* which does not load MXCSR */
				if (bad == 4 && kind == ON_STACK) continue; /* whose stores fault first */
				if (bad == 6) at = data + data_pages * PAGE - 1152; /* the end of the area is in no page */
				uint64_t end = data + data_pages * PAGE;
				if (bad == 7) { /* the header is in a page that the enclave has not accepted */
					at = end - 512 - offset[kind];
					CHECK(mmap((void *)end, PAGE, 3, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
				}
				uint8_t *real = (uint8_t *)at + offset[kind];
				memset(real, 0, 512);
				if (bad != 7) memset(real + 512, 0, 64);
				if (bad == 7) ;
				else if (bad == 0) at += 8;
				else if (bad == 6 && !restores[kind]) ;
				else if (bad == 4) at = base + 7 * PAGE + 8; /* nothing is there: that it is misaligned comes first */
				else if (!restores[kind]) continue;
				else if (bad == 1) *(uint64_t *)(real + 512) = foreign;
				else if (bad == 2) *(uint64_t *)(real + 520) = 1ul << 63 | 3 | foreign;
				else if (bad == 3) *(uint64_t *)(real + 536) = 1, *(uint64_t *)(real + 520) = 1ul << 63 | 3;
				else {
					*(uint64_t *)(real + 512) = xfrm & 0xe7;
					*(uint32_t *)(real + 24) = bad == 5 ? 0x11f80 : 0x1f80;
				}
				set_state(2);
				CHECK(!call(0, MASKED + kind, at, flags, (uint64_t)&seen, &run));
				CHECK(run.function == 3 && run.vector == (bad >= 6 ? 14 : 13));
				if (bad == 7) CHECK(!munmap((void *)end, PAGE));
				memset((void *)(frame + 28), 0, 4); /* MXCSR_MASK */
				uint64_t sum = 0; /* of the state at the fault */
				for (int i = 0; i < AREA; i += 8) sum = sum * 31 + *(uint64_t *)(frame + i);
				printf("%lx %x %lx\n", sum, run.code, run.address ? run.address - base : 0);
				uint64_t gpr = GPR(frame), word[18];
				memcpy(word, (void *)gpr, sizeof word);
				printf("%d %d %d: rax %lx rcx %lx rdx %lx flags %lx rip %lx\n", round, kind, bad, word[0], word[1] - (kind == OPTIMISED ? 0 : base), word[2], word[16] & ~0x10000ul, word[17] - base);
				/* the next entry by this TCS: resume behind the instruction */
				static const int length[KINDS] = {4, 4, 4, 4, 6, 4, 4, 5, 5, 3, 5};
				*(uint64_t *)(gpr + 136) += length[kind];
				if (bad == 7 && kind == ON_STACK) *(uint64_t *)(gpr + 136) += 8 + 5; /* the first store has faulted */
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
	CHECK(argc > 3);
	file = argv[1];
	xfrm = strtoul(argv[2], NULL, 0);
	enter = find_enter();
	CHECK(enter);
	if (!strcmp(argv[3], "same")) others = strtoul(argv[5], NULL, 0), same(strtoul(argv[4], NULL, 0), argv[6]);
	else if (!strcmp(argv[3], "calls")) calls(strtoul(argv[4], NULL, 0), !strcmp(argv[5], "compacted"));
	else refused();
	return 0;
}
