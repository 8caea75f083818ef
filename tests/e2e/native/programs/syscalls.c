/*
 * Random system calls while enclaves are alive and threads are inside.
 * usage: syscalls ENCLAVE SEED STEPS LOG [-]; STEPS are ranges, as 0-99,120; with "-" no enclave is used.
 *
 * Calls that concern no enclave are logged with their results: the kernel alone must give the same.  The others abuse
 * descriptors, mappings and memory of an enclave.  Each step follows from the seed and its number, so steps can be left
 * out.  Exit status 0 says that the enclave has kept what it was given, whatever was done.
 */
#include "sgx.h"
#include <sched.h>
#include <sys/file.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { MAIN, FIRST_WORKER, LAST_WORKER = 3, CHILD, BYSTANDER };
/* Data pages: those that threads check all the time; those whose mappings are abused; those that anything is done to. */
enum { KEPT = 8, OVER = 14, ALL = 20 };
#define ARENA ((char *)0x100000000000)
#define ARENA_PAGES 32ul
#define LOW 3
#define HIGH 40
#define DEVICE 900
#define LOG 950
#define COUNT(a) (sizeof (a) / sizeof *(a))

static uint64_t seed, state;
static int enclave = 1, step;
static volatile int ending;
static pid_t leader, workers[LAST_WORKER + 1];
static char scratch[1 << 16] __attribute__((aligned(4096)));
static sigjmp_buf jump;
static volatile int jumping;

static uint64_t next(uint64_t *s) { *s ^= *s << 13; *s ^= *s >> 7; *s ^= *s << 17; return *s * 0x2545f4914f6cdd1d >> 11; }
static uint64_t rnd(void) { return next(&state); }
static uint64_t below(uint64_t n) { return rnd() % n; }
static int one_in(uint64_t n) { return !below(n); }
#define PICK(...) ({ uint64_t picks_[] = {__VA_ARGS__}; picks_[below(COUNT(picks_))]; })

static void fail(const char *what, uint64_t a, uint64_t b)
{
	fprintf(stderr, "step %d: %s (%lx, %lx, errno %d)\n", step, what, a, b, errno);
	fflush(stderr);
	_exit(90);
}

/* --- calls that concern no enclave ------------------------------------------------------------ */

static void say(const char *format, ...)
{
	char line[200];
	va_list list;
	va_start(list, format);
	int size = vsnprintf(line, sizeof line, format, list);
	va_end(list);
	if (syscall(SYS_write, LOG, line, size) != size) _exit(91);
}

static long raw(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	long result = syscall(number, a, b, c, d, e, f);
	return result == -1 ? -errno : result;
}
/* A call whose result is the kernel's. */
static long call_(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	long result = raw(number, a, b, c, d, e, f);
	say("%d: %ld(%lx, %lx, %lx, %lx, %lx) = %ld\n", step, number, a, b, c, d, e, result);
	return result;
}
#define DO6(n, a, b, c, d, e, f, ...) call_(n, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c), (uint64_t)(d), (uint64_t)(e), (uint64_t)(f))
#define DO(n, ...) DO6(n, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
/* A call whose arguments are addresses of this process: only its result is logged. */
#define QUIET6(n, a, b, c, d, e, f, ...) raw(n, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c), (uint64_t)(d), (uint64_t)(e), (uint64_t)(f))
#define QUIET(n, ...) QUIET6(n, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define TOLD(n, ...) say("%d: %ld = %ld\n", step, (long)(n), QUIET(n, __VA_ARGS__))

static uint64_t wild(void)
{
	return PICK(0, 1, 8, ~0ul, ~0ul - 7, ~0ul - 4095, 0x7ffffffff000, 0x800000000000, 1ul << 63, 0xffff800000000000, rnd() | 1ul << 62, 0x1234);
}
static uint64_t arena(void)
{
	uint64_t at = (uint64_t)ARENA + below(ARENA_PAGES) * PAGE;
	switch (below(8)) {
	case 0: return at + below(PAGE);
	case 1: return at - 8;
	case 2: return (uint64_t)ARENA + ARENA_PAGES * PAGE - 8;
	default: return at;
	}
}
static uint64_t memory(void) { return one_in(4) ? wild() : arena(); }
static uint64_t out(void) { return one_in(3) ? wild() : (uint64_t)scratch; }
static uint64_t pages(void)
{
	return one_in(6) ? PICK(0, 1, 100, PAGE - 1, ~0ul, ~0ul - 4095, 1ul << 47, 1ul << 46, 1ul << 63, 0x7ffffffff000) : (1 + below(8)) * PAGE;
}
static uint64_t bytes(void) { return one_in(6) ? PICK(0, 1, ~0ul, 1ul << 63, 1ul << 31, 1ul << 47) : below(3 * PAGE); }
static uint64_t buffered(void) { uint64_t size = bytes(); return size < sizeof scratch ? size : sizeof scratch; }
static int descriptor(void) { return one_in(8) ? (int)PICK(~0ul, 1000, 0x7fffffff, 0x80000000, 41, (uint64_t)-100) : (int)LOW + (int)below(HIGH - LOW) / 2; }
static uint64_t wide(int fd) { return one_in(6) ? (uint32_t)fd | rnd() << 32 : (uint64_t)fd; } /* the kernel takes 32 bits */

static uint64_t path(void)
{
	static const char *const known[] = {"/dev/null", "/dev/sg", "/dev/sgx_enclav", "/dev/sgx_enclave_", "", "/", "/dev", "/nowhere", "/dev/null/", "relative",
		"/proc/self/fd/99", "/proc/self/fd/99999999999999999999", "/proc/99999999999/fd/3", "/proc/self/mem/", "/proc/self/mapsx", "/sys/fs/cgroup/softsgy", "/dev/../dev/null"};
	char *place = scratch + 4096 + below(3) * 1024;
	switch (below(8)) {
	case 0: return wild();
	case 1: memset(place, 'a', 5000); place[5000] = 0; return (uint64_t)place;
	case 2: strcpy(scratch + 8192 - 9, "/dev/null"); memset(scratch + 8192, one_in(2) ? 0 : 'x', 1); scratch[8193] = 0; return (uint64_t)scratch + 8192 - 9;
	default: return (uint64_t)known[below(COUNT(known))];
	}
}

static void opened(long fd)
{
	if (fd > HIGH) close(fd);
}

static void names(void)
{
	switch (below(12)) {
	case 0: { long fd = QUIET(SYS_openat, AT_FDCWD, path(), PICK(0, O_PATH, O_DIRECTORY, O_RDWR | O_NONBLOCK, O_CLOEXEC)); say("%d: openat %ld\n", step, fd); opened(fd); break; }
	case 1: { long fd = QUIET(SYS_open, path(), PICK(0, O_WRONLY, O_NOFOLLOW, O_RDONLY | O_NONBLOCK), 0600); say("%d: open %ld\n", step, fd); opened(fd); break; }
	case 2: TOLD(SYS_stat, path(), out()); break;
	case 3: TOLD(SYS_lstat, path(), out()); break;
	case 4: TOLD(SYS_fstat, wide(descriptor()), out()); break;
	case 5: TOLD(SYS_newfstatat, one_in(2) ? AT_FDCWD : descriptor(), path(), out(), PICK(0, 0x1000, 0x100, 0x80000000, 0x800)); break;
	case 6: TOLD(SYS_statx, one_in(2) ? AT_FDCWD : descriptor(), path(), PICK(0, 0x1000, 0x6000, 0x100), PICK(0x7ff, 0, 0x80000000), out()); break;
	case 7: TOLD(SYS_access, path(), below(9)); break;
	case 8: TOLD(439 /* faccessat2 */, AT_FDCWD, path(), below(9), PICK(0, 0x200, 0x1000, 1)); break;
	case 9: TOLD(SYS_readlink, path(), out(), PICK(0, 1, 100, ~0ul)); break;
	case 10: TOLD(SYS_statfs, path(), out()); break;
	default: {
		uint64_t how[4] = {PICK(0, O_PATH, O_RDWR, ~0ul), one_in(3) ? 0600 : 0, PICK(0, 0x10, ~0ul), one_in(4) ? rnd() : 0};
		long fd = QUIET(437 /* openat2 */, AT_FDCWD, path(), one_in(4) ? wild() : (uint64_t)how, PICK(24, 24, 24, 32, 8, 0, ~0ul, 8192));
		say("%d: openat2 %ld\n", step, fd);
		opened(fd);
	}
	}
}

static uint64_t rights(void) { return PICK(0, 1, 2, 3, 3, 3, 5, 7, 8, 16, 0x1000003, ~0ul); }
static const int advices[] = {0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 26, 30, 1000, -1};
/* An end above all memory is legal: libraries and the stack keep their content, also in children. */
static uint64_t advised(uint64_t size, int advice) { return (advice == MADV_DONTNEED || advice == MADV_DONTFORK) && size > 1ul << 40 ? PAGE : size; }

/* Where memory was mapped or moved to outside the arena is the kernel's choice. */
static void placed(const char *what, long at, uint64_t size)
{
	int inside = at >= (long)ARENA && at < (long)(ARENA + 2 * ARENA_PAGES * PAGE);
	say("%d: %s %lx\n", step, what, inside || at < 0 ? at : 0);
	if (!inside && at > 0) QUIET(SYS_munmap, at, size);
}

static void mappings(void)
{
	uint64_t at, size;
	switch (below(10)) {
	case 0: case 1: case 2: {
		uint64_t flags = PICK(MAP_PRIVATE, MAP_PRIVATE, MAP_SHARED, 3, 0) | PICK(MAP_ANONYMOUS, MAP_ANONYMOUS, 0) | PICK(MAP_FIXED, MAP_FIXED, MAP_FIXED, 0x100000, 0) | PICK(0, 0, 0, MAP_NORESERVE, MAP_POPULATE, MAP_LOCKED, MAP_STACK);
		if (one_in(8)) flags |= MAP_FIXED;
		size = pages();
		at = flags & (MAP_FIXED | 0x100000) ? one_in(5) ? wild() : arena() : 0;
		if (size > 8 * PAGE && size < 0x7ffffffff000) size = PAGE; /* filled, it takes all memory for its page tables */
		if (at >= 1 && at < 0x7fffffff) at = 0; /* such low mappings are root's right */
		placed("mmap", raw(SYS_mmap, at, size, rights(), at ? flags : flags & ~(uint64_t)(MAP_FIXED | 0x100000), wide(descriptor()), PICK(0, 0, 0, PAGE, 1, 1ul << 63)), size);
		break;
	}
	case 3: {
		/* PROT_GROWSDOWN depends on the first mapping behind the address: below the arena, an enclave only with softsgx. */
		uint64_t at = memory();
		DO(SYS_mprotect, at, pages() & 0xffffffffff, at < (uint64_t)ARENA ? rights() & 0xff : rights());
		break;
	}
	case 4: if (one_in(3)) { DO(SYS_munmap, arena(), (1 + below(8)) * PAGE); } else { DO(SYS_munmap, wild(), one_in(2) ? ~0ul : 0); } break;
	case 5: case 6: {
		uint64_t flags = PICK(0, 1, 1, 3, 3, 2, 5, 8, ~0ul);
		at = memory(); size = (1 + below(8)) * PAGE;
		uint64_t bigger = one_in(6) ? PICK(0, 1, ~0ul, 1ul << 47) : (1 + below(8)) * PAGE;
		placed("mremap", raw(SYS_mremap, at, one_in(8) ? PICK(0, ~0ul, 1ul << 47) : size, bigger, flags, memory(), 0), bigger);
		break;
	}
	case 7: case 8: {
		uint64_t at = memory(), size = pages();
		int advice = advices[below(COUNT(advices))];
		DO(SYS_madvise, at, advised(size, advice), advice);
		break;
	}
	default:
		switch (below(5)) {
		case 0: DO(SYS_mlock, memory(), (1 + below(4)) * PAGE); break;
		case 1: DO(SYS_mlock2, memory(), bytes(), below(3)); break;
		case 2: DO(SYS_munlock, memory(), (1 + below(4)) * PAGE); break;
		case 3: DO(SYS_msync, memory(), pages(), below(8)); break;
		default: DO(SYS_pkey_mprotect, memory(), (1 + below(4)) * PAGE, rights(), PICK(~0ul, 0, 77)); break;
		}
	}
}

static void hash_arena(void)
{
	uint64_t sum = 0;
	for (uint64_t i = 0; i < ARENA_PAGES; i++) {
		struct iovec to = {scratch, PAGE}, from = {ARENA + i * PAGE, PAGE};
		long got = raw(SYS_process_vm_readv, leader, (uint64_t)&to, 1, (uint64_t)&from, 1, 0);
		sum = sum * 31 + got;
		for (long j = 0; j < got; j++) sum = sum * 31 + (uint8_t)scratch[j];
	}
	say("%d: arena %lx\n", step, sum);
}

static void remote(void)
{
	struct iovec *local = (void *)scratch, *theirs = local + 8;
	for (int i = 0; i < 8; i++) {
		local[i] = (struct iovec){(void *)memory(), one_in(8) ? bytes() : below(2 * PAGE)};
		theirs[i] = (struct iovec){(void *)memory(), one_in(8) ? bytes() : below(2 * PAGE)};
	}
	TOLD(PICK(SYS_process_vm_readv, SYS_process_vm_writev), one_in(6) ? PICK(0, ~0ul, 0x7ffffffe) : (uint64_t)leader, one_in(6) ? wild() : (uint64_t)local, PICK(1, 2, 8, 0, 1025),
	     one_in(6) ? wild() : (uint64_t)theirs, PICK(1, 2, 8, 0, 1025, ~0ul), PICK(0, 0, 0, 1));
}

static void more_descriptors(void)
{
	int both[2] = {-1, -1};
	switch (below(6)) {
	case 0: opened(raw(SYS_memfd_create, (uint64_t)"m", PICK(0, 1, 2, 3), 0, 0, 0, 0)); break;
	case 1: opened(raw(SYS_open, (uint64_t)"/dev/zero", O_RDWR, 0, 0, 0, 0)); break;
	case 2: raw(SYS_pipe2, (uint64_t)both, O_NONBLOCK, 0, 0, 0, 0); opened(both[0]); opened(both[1]); break;
	case 3: raw(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, (uint64_t)both, 0, 0); opened(both[0]); opened(both[1]); break;
	case 4: opened(raw(SYS_open, (uint64_t)"/", O_DIRECTORY, 0, 0, 0, 0)); break;
	default: opened(raw(SYS_open, (uint64_t)"/tmp", O_TMPFILE | O_RDWR, 0600, 0, 0, 0)); break;
	}
	say("%d: more\n", step);
}

static void descriptors(void)
{
	int fd = descriptor();
	switch (below(20)) {
	case 0: case 1: case 2: more_descriptors(); break;
	case 3: opened(DO(SYS_dup, descriptor())); break;
	case 4: DO(SYS_dup2, wide(fd), LOW + below(HIGH - LOW)); break;
	case 5: DO(SYS_dup3, fd, LOW + below(HIGH - LOW), PICK(0, O_CLOEXEC, 1)); break;
	case 6: DO(SYS_close, fd); break;
	case 7: if (one_in(4)) DO(436 /* close_range */, LOW + below(HIGH - LOW), LOW + below(HIGH - LOW), PICK(0, 0, 4, 8)); break;
	case 8: opened(DO(SYS_fcntl, wide(fd), PICK(0, 1030), LOW + below(HIGH - LOW))); break;
	case 9: DO(SYS_fcntl, fd, PICK(1, 2, 3, 1034, 1032, 9999), below(2)); break;
	case 10: DO(SYS_fcntl, fd, 1033 /* F_ADD_SEALS */, PICK(0, 2, 4, 8, 16, 1, ~0ul)); break;
	case 11: DO(PICK(SYS_read, SYS_write), wide(fd), memory(), bytes()); break;
	case 12: DO(PICK(SYS_pread64, SYS_pwrite64), wide(fd), memory(), below(3 * PAGE), PICK(0, 100, PAGE, 1ul << 40, 1ul << 63, ~0ul)); break;
	case 13: DO(SYS_lseek, wide(fd), PICK(0, 1, PAGE, 1ul << 40, ~0ul), below(6)); break;
	case 14: DO(SYS_ftruncate, fd, PICK(0, 1, PAGE, 1ul << 40, 1ul << 63)); break;
	case 15: DO(SYS_fallocate, fd, PICK(0, 1, 3, 0x10, ~0ul), PICK(0, PAGE, 1ul << 63), PICK(0, PAGE, 1ul << 63)); break;
	case 16: DO(SYS_sendfile, descriptor(), fd, 0, below(PAGE)); break;
	case 17: DO(SYS_splice, fd, 0, descriptor(), 0, below(PAGE), 2 /* SPLICE_F_NONBLOCK */); break;
	case 18: DO(SYS_copy_file_range, fd, 0, descriptor(), 0, below(PAGE), PICK(0, 0, 1)); break;
	default: DO(PICK(SYS_fsync, SYS_fdatasync, SYS_flock), fd, LOCK_SH | LOCK_NB); break;
	}
}

static void scheduling(void)
{
	uint64_t *mask = (void *)scratch;
	switch (below(3)) {
	case 0:
		memset(mask, 0, 256);
		TOLD(SYS_sched_getaffinity, PICK(0, 0, 0, 0x7ffffffe, ~0ul), PICK(8, 128, 4, 0, ~0ul, 12), out());
		say("%d: mask %lx\n", step, mask[0]);
		break;
	case 1:
		memset(mask, 0, 256);
		mask[0] = PICK(1, 2, 3, 0, ~0ul);
		TOLD(SYS_sched_setaffinity, PICK(0, 0, 0, 0x7ffffffe, ~0ul), PICK(8, 128, 4, 0), out());
		break;
	default: {
		/* A fault must reach its handler; the C library keeps 32 and 33 for itself. */
		const uint64_t never = 1ul << (SIGUSR1 - 1) | 1ul << (SIGSEGV - 1) | 1ul << (SIGBUS - 1) | 3ul << 31;
		uint64_t set = rnd() & ~never, old = 0;
		TOLD(SYS_rt_sigprocmask, below(4), one_in(4) ? wild() : (uint64_t)&set, &old, PICK(8, 8, 8, 4));
		say("%d: blocked %lx\n", step, old);
	}
	}
}

/* --- calls that concern the enclave ----------------------------------------------------------- */

static uint64_t pattern(uint64_t page) { return 0x1122334455660000 ^ seed << 20 ^ page; }
static uint64_t page_at(uint64_t page) { return data + page * PAGE; }

static void expect(int thread, uint64_t page, uint64_t offset, uint64_t value)
{
	struct run run;
	uint64_t found = 0;
	int result = call(thread, GET, page_at(page) + offset, 0, (uint64_t)&found, &run);
	if (thread == CHILD && !result && run.function == 2 && run.vector == 13) return; /* others were killed in it */
	if (result || run.function != 4) {
		fprintf(stderr, "page %lu: result %d function %u vector %u code %x address %lx\n", page, result, run.function, run.vector, run.code, run.address);
		fail("an entry", page, thread);
	}
	if (found != value) fail("another value", found, value);
}

static void *work(void *arg)
{
	int thread = (long)arg;
	uint64_t own = seed * 7919 + thread;
	struct run run;
	workers[thread] = syscall(SYS_gettid);
	while (!ending) {
		uint64_t page = next(&own) % KEPT, value = next(&own);
		put(thread, page_at(page) + 8 + 8 * thread, value);
		if (next(&own) % 4 == 0 && call(thread, SPIN, 1 + next(&own) % 3000, 0, 0, &run)) fail("an entry", page, thread);
		expect(thread, page, 8 + 8 * thread, value);
		expect(thread, page, 0, pattern(page));
	}
	return NULL;
}

/* Another process of the run, with an enclave of its own: it goes on, whatever is done here. */
static pid_t bystander(int *until)
{
	int pipes[2];
	CHECK(!pipe(pipes));
	pid_t pid = fork();
	if (!pid) {
		char byte;
		close(pipes[1]);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		build();
		for (uint64_t i = 0; i < data_pages; i++) put(MAIN, page_at(i), i);
		fcntl(pipes[0], F_SETFL, O_NONBLOCK);
		while (read(pipes[0], &byte, 1) < 0) {
			for (uint64_t i = 0; i < data_pages; i += 3) expect(MAIN, i, 0, i);
			usleep(1000);
		}
		_exit(0);
	}
	close(pipes[0]);
	CHECK(dup2(pipes[1], LOG + 1) == LOG + 1 && !close(pipes[1]));
	*until = LOG + 1;
	return pid;
}

static void restore(void)
{
	for (uint64_t i = KEPT; i < OVER; i++) CHECK(mmap((void *)page_at(i), PAGE, 3, MAP_SHARED | MAP_FIXED, DEVICE, 0) != MAP_FAILED);
	for (uint64_t i = KEPT; i < OVER; i++) expect(MAIN, i, 0, pattern(i));
	for (uint64_t i = OVER; i < ALL; i++) mmap((void *)page_at(i), PAGE, PICK(1, 3), MAP_SHARED | MAP_FIXED, DEVICE, 0);
}

static uint64_t over(void) { return page_at(KEPT + below(ALL - KEPT)); }
static uint64_t trash(void) { return page_at(OVER + below(ALL - OVER)) + (one_in(3) ? below(PAGE) : 0); }
/* To the end of the range at most: behind it is what the kernel has put there. */
static uint64_t some(uint64_t at, uint64_t size) { uint64_t left = page_at(ALL) - at; return size < left ? size : left; }

static void enclave_mappings(void)
{
	uint64_t at = over(), size = some(at, (1 + below(5)) * PAGE), target = over();
	char *other = scratch + 32768;
	switch (below(12)) {
	case 0: case 1: QUIET(SYS_mmap, at, size, below(8), MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | PICK(0, 0, MAP_LOCKED, MAP_POPULATE), ~0ul, 0); break;
	case 2: QUIET(SYS_mmap, at, size, below(4), PICK(MAP_PRIVATE, MAP_SHARED) | MAP_FIXED, descriptor(), 0); break;
	case 3: QUIET(SYS_mmap, one_in(4) ? rnd() : at, one_in(4) ? pages() : size, below(16), PICK(MAP_SHARED, MAP_PRIVATE, 3, 0) | PICK(MAP_FIXED, 0x100000), one_in(8) ? 1000 : DEVICE, PICK(0, PAGE, 1)); break;
	case 4: case 5: QUIET(SYS_mprotect, at + (one_in(6) ? 8 : 0), one_in(8) ? PICK(0, 1, ~0ul) : size, PICK(0, 1, 2, 3, 3, 5, 7, 8)); break;
	case 6: QUIET(SYS_munmap, at, size); break;
	case 7: { /* ordinary memory goes where the enclave is */
		char *from = mmap(NULL, size, PICK(1, 3, 0), MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		long to = QUIET(SYS_mremap, from, size, PICK(size, PAGE), PICK(3, 7), at);
		if (to < 0) munmap(from, size);
		break;
	}
	case 8: { /* and the enclave's elsewhere */
		long to = QUIET(SYS_mremap, at, size, PICK(size, PAGE, 2 * size, 0, ~0ul), PICK(0, 1, 3, 5), one_in(2) ? target : (uint64_t)other);
		if (to > 0 && (uint64_t)to != at && (uint64_t)to != target) munmap((void *)to, size);
		mmap(other, 32768, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	}
	case 9: {
		int advice = advices[below(COUNT(advices))];
		QUIET(SYS_madvise, at, advised(one_in(6) ? pages() : size, advice), advice);
		break;
	}
	case 10: QUIET(PICK(SYS_mlock, SYS_munlock, SYS_msync), at, size, 4); break;
	default: restore();
	}
}

static void ioctls(void)
{
	uint64_t *request = (void *)(scratch + 16384);
	uint64_t start = page_at(OVER) - base;
	uint64_t commands[] = {0x4008a400, 0xc030a401, 0x4008a402, 0x4008a403, 0xc028a405, 0xc028a406, 0xc018a407, 0xa404, 0xa4ff, 0xc028a405ul | 1ul << 40};
	for (int i = 0; i < 6; i++) request[i] = one_in(2) ? wild() : below(8);
	request[0] = one_in(4) ? rnd() | 1ul << 40 : start + below(8) * PAGE + one_in(8);
	request[1] = one_in(8) ? pages() & ~(0xful << 40) : below(4) * PAGE;
	if (one_in(2)) { request[2] = below(8); request[3] = request[4] = 0; }
	raw(SYS_ioctl, one_in(8) ? descriptor() : DEVICE, commands[below(COUNT(commands))], one_in(6) ? wild() : (uint64_t)request, 0, 0, 0);
}

/* An enclave that is half built, and wrongly. */
static void another(void)
{
	int fd = open("/dev/sgx_enclave", O_RDWR);
	if (fd < 0) fail("open", fd, 0);
	uint64_t *secs = (void *)scratch, *info = (void *)(scratch + PAGE), place = one_in(3) ? wild() : 0x110000000000, at = (uint64_t)secs;
	memset(scratch, 0, 2 * PAGE);
	secs[0] = one_in(3) ? 1ul << below(64) : 0x10000;
	secs[1] = place;
	((uint32_t *)secs)[4] = one_in(4) ? rnd() : 1;
	secs[6] = one_in(4) ? rnd() : 4;
	secs[7] = one_in(4) ? rnd() : 3;
	info[0] = PICK(0x203, 0x203, 0x205, 0x100, rnd());
	QUIET(SYS_ioctl, fd, 0x4008a400, &at);
	for (int i = below(4); i; i--) {
		uint64_t add[6] = {one_in(6) ? wild() : (uint64_t)scratch + below(4) * PAGE, below(16) * PAGE, one_in(8) ? pages() : below(4) * PAGE, one_in(8) ? wild() : (uint64_t)info, one_in(8) ? rnd() : below(2), 0};
		QUIET(SYS_ioctl, fd, 0xc030a401, add);
	}
	if (one_in(2)) QUIET(SYS_mmap, 0x110000000000, PICK(PAGE, 0x10000, 0x20000), below(8), MAP_SHARED | MAP_FIXED, fd, 0);
	if (one_in(2)) { uint64_t init = one_in(2) ? wild() : (uint64_t)scratch; QUIET(SYS_ioctl, fd, 0x4008a402, &init); }
	if (one_in(4)) QUIET(SYS_dup2, fd, 910 + below(4));
	if (one_in(4)) { pid_t child = fork(); if (!child) _exit(0); waitpid(child, NULL, 0); }
	QUIET(SYS_munmap, 0x110000000000, 0x20000);
	if (one_in(8)) close(910 + below(4));
	close(fd);
}

static void limit(int which, uint64_t most)
{
	struct rlimit value = {most, most};
	setrlimit(which, &value);
}

/* What a child does before it ends, by itself or by a signal. */
static void child(void)
{
	struct run run;
	CHECK(!unshare(CLONE_FILES)); /* descriptors that it leaves open are its own */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	limit(RLIMIT_CORE, 0);
	alarm(20);
	signal(SIGSEGV, SIG_DFL);
	signal(SIGBUS, SIG_DFL);
	switch (below(16)) {
	case 0: for (int i = 0; i < KEPT; i++) expect(CHILD, i, 0, pattern(i)); break;
	case 1: limit(RLIMIT_NOFILE, below(4)); open("/dev/sgx_enclave", O_RDWR); open("/proc/self/maps", O_RDONLY); expect(CHILD, 0, 0, pattern(0)); break;
	case 2: limit(RLIMIT_AS, 1 << 20); open("/dev/sgx_enclave", O_RDWR); mmap(NULL, size, 1, MAP_SHARED, DEVICE, 0); fork(); break;
	case 3: limit(RLIMIT_FSIZE, 0); build(); put(CHILD, data, 5); break;
	case 4: QUIET(436, 0, ~0u, 0); call(CHILD, GET, data, 0, (uint64_t)&run, &run); break;
	case 5: QUIET(SYS_munmap, base, size); call(CHILD, GET, data, 0, 0, &run); break;
	case 6: prctl(PR_SET_DUMPABLE, 0); open("/dev/sgx_enclave", O_RDWR); build(); put(CHILD, data, 5); break;
	case 7: if (!unshare(CLONE_FILES)) { close(DEVICE); expect(CHILD, 0, 0, pattern(0)); } break;
	case 8: unshare(PICK(CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNS, CLONE_FS)); if (!fork()) { open("/dev/sgx_enclave", O_RDWR); _exit(0); } wait(NULL); break;
	case 9: { char *words[] = {"x", NULL}; execv((char *)PICK((uint64_t)"/bin/true", (uint64_t)"/", (uint64_t)"/nowhere", (uint64_t)"/dev/sgx_enclave", (uint64_t)"/dev/null"), (char **)PICK((uint64_t)words, (uint64_t)words, 1, ~0ul)); break; }
	case 10: go(PICK(CHILD, 100, rnd() >> 20), PICK(2, 3, 0, rnd()), GET, wild(), wild(), wild(), &run); break;
	case 11: enter(0, 0, 0, 2, 0, 0, (struct run *)wild()); break;
	case 12: __asm__ volatile("mov %0, %%rsp\n mov $2, %%eax\n .byte 0x0f, 0x01, 0xd7\n push %%rax\n" : : "r"(wild()), "b"(base + CHILD * PAGE), "c"(wild()) : "rax", "memory"); break;
	case 13: { stack_t bad = {.ss_sp = (void *)wild(), .ss_size = 65536}; sigaltstack(&bad, NULL); call(CHILD, RUN, wild(), 0, 0, &run); raise(SIGSEGV); break; }
	case 14: kill(getpid(), PICK(SIGKILL, SIGTERM, SIGSEGV, SIGTRAP, SIGSYS, SIGBUS, SIGILL)); break;
	default: call(CHILD, PUT, one_in(2) ? wild() : trash(), 1, 0, &run); call(CHILD, UD2, 0, 0, 0, &run); raw_enter(base + CHILD * PAGE, 0, 0, UD2, 0); break;
	}
	_exit(0);
}

static void children(void)
{
	int status;
	uint64_t flags = SIGCHLD | PICK(0, 0, 0, CLONE_FILES, CLONE_FS, CLONE_UNTRACED, CLONE_PTRACE, CLONE_PARENT, CLONE_NEWUSER, CLONE_NEWPID, CLONE_SYSVSEM | CLONE_IO, CLONE_SIGHAND, CLONE_THREAD);
	uint64_t args[11] = {flags & ~0xfful, 0, 0, 0, SIGCHLD};
	sigset_t none;
	pid_t pid;
	switch (below(4)) {
	case 0: pid = raw(SYS_clone, flags, 0, 0, 0, 0, 0); break;
	case 1: pid = raw(435 /* clone3 */, one_in(4) ? wild() : (uint64_t)args, PICK(64, 88, 8, ~0ul), 0, 0, 0, 0); break;
	case 2: pid = vfork(); if (!pid) { if (one_in(2)) execl("/bin/true", "true", NULL); _exit(0); } break;
	default: pid = fork();
	}
	if (!pid) {
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		child();
	}
	if (pid > 0 && flags & CLONE_PARENT) return; /* it is not ours */
	if (pid > 0 && waitpid(pid, &status, __WALL) != pid) fail("waitpid", pid, 0);
	if (pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 90) fail("a child", pid, 0);
}

static void read_all(const char *name)
{
	int fd = open(name, O_RDONLY);
	if (fd < 0) return;
	while (read(fd, scratch, sizeof scratch) > 0) {}
	close(fd);
}

static void proc(void)
{
	char name[64];
	int fd;
	switch (below(5)) {
	case 0: read_all("/proc/self/maps"); break;
	case 1: sprintf(name, "/proc/self/task/%d/maps", workers[FIRST_WORKER]); read_all(name); break;
	case 2:
		sprintf(name, "/proc/%d/mem", leader);
		fd = open(name, O_RDWR);
		if (fd < 0) fail("open", fd, 0);
		/* The kernel copies what lies behind the enclave too: no more than the buffer holds. */
		QUIET(SYS_pread64, fd, out(), buffered(), one_in(3) ? wild() : trash());
		QUIET(SYS_pwrite64, fd, scratch, below(PAGE), one_in(3) ? wild() : trash());
		QUIET(SYS_lseek, fd, trash(), 0);
		QUIET(SYS_read, fd, out(), buffered());
		close(fd);
		break;
	case 3: sprintf(name, "/proc/self/fd/%d", DEVICE); fd = open(name, below(4)); if (fd >= 0) close(fd); readlink(name, scratch, 100); break;
	default: read_all("/proc/self/smaps"); read_all("/proc/cpuinfo");
	}
}

/* From outside, by the processor and by the kernel. */
static void outside(void)
{
	struct iovec here = {scratch, below(2 * PAGE)}, there = {(void *)trash(), below(2 * PAGE)};
	uint64_t at = trash();
	int fd;
	switch (below(6)) {
	case 0: case 1:
		jumping = 1;
		if (!sigsetjmp(jump, 1)) { if (one_in(2)) *(volatile char *)at; else *(volatile char *)at = 1; }
		jumping = 0;
		break;
	case 2: QUIET(PICK(SYS_process_vm_readv, SYS_process_vm_writev), leader, &here, 1, &there, 1, 0); break;
	case 3: fd = open("/dev/zero", O_RDWR); QUIET(PICK(SYS_read, SYS_write), fd, at, some(at, below(2 * PAGE))); close(fd); break;
	case 4: QUIET(SYS_stat, at, scratch); QUIET(SYS_stat, "/", at); QUIET(SYS_open, at, 0); QUIET(SYS_readlink, "/proc/self/exe", at, 100); break;
	default: QUIET(SYS_sched_getaffinity, 0, 128, at); QUIET(SYS_rt_sigaction, SIGUSR2, at, 0, 8);
	}
}

static void device_descriptors(void)
{
	int to = 910 + below(8);
	switch (below(8)) {
	case 0: QUIET(SYS_dup2, DEVICE, to); break;
	case 1: QUIET(SYS_dup3, to, 910 + below(8), 0); break;
	case 2: close(QUIET(SYS_fcntl, DEVICE, 0, 910)); break;
	case 3: QUIET(436, 910, 910 + below(8), PICK(0, 4)); break;
	case 4: QUIET(PICK(SYS_read, SYS_write, SYS_pread64, SYS_pwrite64), PICK(DEVICE, to), scratch, below(PAGE), trash()); break;
	case 5: QUIET(PICK(SYS_ftruncate, SYS_lseek, SYS_fsync, SYS_fallocate, SYS_flock), PICK(DEVICE, to), 0, 0, PAGE); break;
	case 6: QUIET(SYS_sendfile, DEVICE, to, 0, 100); QUIET(SYS_fcntl, DEVICE, 1033, 0xf); break;
	default: { int fd = open((char *)PICK((uint64_t)"/dev/sgx_enclave", (uint64_t)"/dev/sgx_provision", (uint64_t)"/dev/sgx/enclave"), below(4)); if (fd >= 0) { dup2(fd, to); close(fd); } }
	}
}

static void signals(void)
{
	pid_t tid = workers[FIRST_WORKER + below(LAST_WORKER)];
	for (int i = below(4); i; i--) QUIET(SYS_tgkill, leader, one_in(4) ? leader : tid, SIGUSR1);
}

static void nothing(int number) { (void)number; }
static void fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (jumping && syscall(SYS_gettid) == leader) siglongjmp(jump, 1);
	fprintf(stderr, "step %d: signal %d, code %d, at %p\n", step, number, info->si_code, info->si_addr);
	fflush(stderr);
	_exit(92);
}

static void one_step(void)
{
	static void (*const common[])(void) = {names, names, mappings, mappings, mappings, remote, descriptors, descriptors, descriptors, scheduling};
	static void (*const abuse[])(void) = {enclave_mappings, enclave_mappings, enclave_mappings, ioctls, another, children, proc, outside, device_descriptors, signals};
	state = (seed * 0x9e3779b97f4a7c15 + step) * 0xbf58476d1ce4e5b9 | 1;
	rnd();
	int abusing = one_in(2);
	void (*what)(void) = abusing ? abuse[below(COUNT(abuse))] : common[below(COUNT(common))];
	if (abusing && !enclave) return;
	what();
	if (!abusing && step % 16 == 0) hash_arena();
	uint64_t page = below(KEPT);
	if (enclave) expect(MAIN, page, 0, pattern(page));
}

int main(int argc, char **argv)
{
	CHECK(argc >= 5);
	file = argv[1]; enter = find_enter();
	seed = strtoull(argv[2], NULL, 0);
	enclave = argc == 5;
	leader = getpid();
	syscall(436, 3, ~0u, 0);
	int log = open(argv[4], O_CREAT | O_TRUNC | O_WRONLY | O_APPEND, 0600), until = -1, status;
	CHECK(log >= 0 && dup2(log, LOG) == LOG && !close(log));
	pid_t other = 0;
	pthread_t threads[LAST_WORKER + 1];
	setvbuf(stderr, NULL, _IOFBF, BUFSIZ);
	signal(SIGPIPE, SIG_IGN); signal(SIGXFSZ, SIG_IGN);
	signal(SIGUSR1, nothing);
	struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
	CHECK(!sigaction(SIGSEGV, &action, NULL) && !sigaction(SIGBUS, &action, NULL));
	CHECK(mmap(ARENA, ARENA_PAGES * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == ARENA);
	for (uint64_t i = 0; i < ARENA_PAGES * PAGE; i += 8) *(uint64_t *)(ARENA + i) = i ^ seed;
	if (enclave) {
		CHECK(enter);
		other = bystander(&until);
		build();
		CHECK(data_pages == ALL && dup2(device, DEVICE) == DEVICE && !close(device));
		for (uint64_t i = 0; i < ALL; i++) put(MAIN, page_at(i), pattern(i));
		for (long i = FIRST_WORKER; i <= LAST_WORKER; i++) CHECK(!pthread_create(&threads[i], NULL, work, (void *)i));
		for (long i = FIRST_WORKER; i <= LAST_WORKER; i++) while (!*(volatile pid_t *)&workers[i]) usleep(100);
	}
	for (char *at = argv[3]; *at; at += *at == ',') {
		int first = strtol(at, &at, 10), last = *at == '-' ? strtol(at + 1, &at, 10) : first;
		for (step = first; step <= last; step++) one_step();
	}
	if (enclave) {
		ending = 1;
		for (long i = FIRST_WORKER; i <= LAST_WORKER; i++) pthread_join(threads[i], NULL);
		restore();
		for (uint64_t i = 0; i < KEPT; i++) expect(MAIN, i, 0, pattern(i));
		close(until);
		CHECK(waitpid(other, &status, 0) == other && !status);
	}
	hash_arena();
	return 0;
}
