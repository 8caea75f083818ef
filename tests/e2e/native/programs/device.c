/*
 * What a program can do to a descriptor of the device, and to memory mapped from it, beside what it
 * is for: Linux's errors, and no byte of the enclave is lost or shown.
 */
#include "sgx.h"
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#define FAILS(call, code) do { errno = 0; CHECK((call) == -1 && errno == (code)); } while (0)
#define SEALS 1033 /* F_ADD_SEALS */

static void fill(void)
{
	for (uint64_t page = 0; page < data_pages; page++) put(0, data + page * PAGE, page + 77);
}

static void check(void)
{
	for (uint64_t page = 0; page < data_pages; page++) CHECK(get(0, data + page * PAGE) == page + 77);
}

static void try_all(int fd)
{
	char buffer[64] = {1};
	struct iovec vector = {buffer, sizeof buffer};
	off_t at = data, zero = 0;
	int file = open("/proc/self/exe", O_RDONLY), null = open("/dev/null", O_RDWR);
	FAILS(read(fd, buffer, sizeof buffer), EINVAL);
	FAILS(write(fd, buffer, sizeof buffer), EINVAL);
	FAILS(pread(fd, buffer, sizeof buffer, at), EINVAL);
	FAILS(pwrite(fd, buffer, sizeof buffer, at), EINVAL);
	FAILS(readv(fd, &vector, 1), EINVAL);
	FAILS(writev(fd, &vector, 1), EINVAL);
	FAILS(preadv(fd, &vector, 1, at), EINVAL);
	FAILS(pwritev(fd, &vector, 1, at), EINVAL);
	FAILS(lseek(fd, 0, SEEK_CUR), ESPIPE);
	FAILS(fsync(fd), EINVAL);
	FAILS(fdatasync(fd), EINVAL);
	FAILS(ftruncate(fd, 0), EINVAL);
	FAILS(fallocate(fd, 0, at, PAGE), ENODEV);
	FAILS(fallocate(fd, 3, at, PAGE), ENODEV);
	FAILS(fallocate(fd, 0, at, 0), EINVAL);
	FAILS(sendfile(fd, file, NULL, 64), EINVAL);
	FAILS(sendfile(null, fd, &at, 64), EINVAL);
	FAILS(copy_file_range(fd, &zero, null, NULL, 64, 0), EINVAL);
	FAILS(fcntl(fd, SEALS, 8), EINVAL);
	CHECK(!flock(fd, LOCK_EX) && !flock(fd, LOCK_UN));
	CHECK(buffer[0] == 1);
	/* other files are as ever */
	CHECK(read(file, buffer, 4) == 4 && !memcmp(buffer, "\177ELF", 4) && lseek(file, 0, SEEK_CUR) == 4);
	CHECK(write(null, buffer, 4) == 4);
	close(file);
	close(null);
}

static void calls(void)
{
	build();
	fill();
	try_all(device);
	int copies[3] = {dup(device), fcntl(device, F_DUPFD, 40), dup2(device, 60)};
	for (int i = 0; i < 3; i++) {
		CHECK(copies[i] >= 0);
		try_all(copies[i]);
	}
	pid_t child = fork();
	if (!child) {
		try_all(device);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status);
	/* The number is an ordinary file's again. */
	close(60);
	int file = open("/proc/self/exe", O_RDONLY);
	char buffer[4];
	CHECK(dup2(file, 60) == 60 && read(60, buffer, 4) == 4 && !memcmp(buffer, "\177ELF", 4));
	check();
}

/* The link in /proc opens the device again, which is another enclave. */
static void links(void)
{
	char link[64];
	build();
	fill();
	snprintf(link, sizeof link, "/proc/self/fd/%d", device);
	int again = open(link, O_RDWR | O_TRUNC);
	CHECK(again >= 0);
	uint64_t zero[5] = {0};
	CHECK(ioctl(again, 0xc028a405, zero) == -1 && errno == EINVAL); /* not created */
	check();
}

/* The descriptor's access mode bounds mappings. */
static void modes(void)
{
	int reader = open("/dev/sgx_enclave", O_RDONLY), writer = open("/dev/sgx_enclave", O_WRONLY);
	CHECK(reader >= 0 && writer >= 0);
	FAILS((long)mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, reader, 0), EACCES);
	FAILS((long)mmap(NULL, PAGE, PROT_READ, MAP_SHARED, writer, 0), EACCES);
	void *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, reader, 0);
	CHECK(page != MAP_FAILED);
	FAILS(mprotect(page, PAGE, PROT_READ | PROT_WRITE), EACCES);
}

/* Advice that memory takes and a device does not; locking, which devices need not. */
static void advice(void)
{
	static const struct { int advice, error; } all[] = {
		{MADV_DONTNEED, EINVAL}, {MADV_REMOVE, ENODEV}, {8, EINVAL}, {MADV_DOFORK, EINVAL},
		{MADV_HUGEPAGE, EINVAL}, {MADV_DODUMP, EINVAL}, {20, EINVAL}, {21, EINVAL}, {22, EINVAL}, {23, EINVAL},
		{MADV_NORMAL, 0}, {MADV_WILLNEED, 0}, {MADV_DONTDUMP, 0}, {MADV_NOHUGEPAGE, 0},
	};
	build();
	fill();
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
		errno = 0;
		int result = madvise((void *)data, data_pages * PAGE, all[i].advice);
		if (errno != all[i].error || (result == 0) != !all[i].error) {
			fprintf(stderr, "advice %d: %d, errno %d\n", all[i].advice, result, errno);
			exit(1);
		}
	}
	CHECK(!mlock((void *)data, data_pages * PAGE) && !munlock((void *)data, data_pages * PAGE));
	/* What lies before it is advised, then the device refuses. */
	char *two = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mmap(two + PAGE, PAGE, PROT_NONE, MAP_SHARED | MAP_FIXED, open("/dev/sgx_enclave", O_RDWR), 0) != MAP_FAILED);
	two[0] = 1;
	FAILS(madvise(two, 2 * PAGE, MADV_REMOVE), EINVAL); /* private memory comes first */
	FAILS(madvise(two + PAGE, PAGE, MADV_REMOVE), ENODEV);
	CHECK(two[0] == 1);
	check();
}

/* No mapping of an enclave is in a core dump. */
static void dumps(void)
{
	char line[512];
	uint64_t start = 0, low, high, seen = 0;
	build();
	FILE *maps = fopen("/proc/self/smaps", "r");
	CHECK(maps);
	while (fgets(line, sizeof line, maps)) {
		if (sscanf(line, "%lx-%lx ", &low, &high) == 2) start = low;
		if (strncmp(line, "VmFlags:", 8) || start < base || start >= base + size) continue;
		CHECK(strstr(line, " dd") || !strstr(line, " sh"));
		seen += !!strstr(line, " dd");
	}
	CHECK(seen);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"calls", calls}, {"links", links}, {"modes", modes}, {"advice", advice}, {"dumps", dumps},
	};
	CHECK(argc >= 3);
	file = argv[1]; enter = find_enter();
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(all[i].name, argv[2])) { all[i].go(); return 0; }
	return 2;
}
