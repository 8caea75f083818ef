/*
 * What a program can do to a descriptor of the device, and to memory mapped from it, beside what it
 * is for: Linux's errors, and no byte of the enclave is lost or shown.
 */
#include "sgx.h"
#include <sys/file.h>
#include <sys/statfs.h>
#include <sys/xattr.h>
#include <utime.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
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
	static const unsigned long of_files[] = {0x541b, 0x5460, 0x80086601, 0x40305828};
	for (int i = 0; i < 4; i++) FAILS(ioctl(fd, of_files[i], buffer), ENOTTY);
	CHECK(!ioctl(fd, 0x5451, NULL) && fcntl(fd, F_GETFD) == FD_CLOEXEC); /* FIOCLEX */
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
	/* A hole in front, and an end that no process has: the device's answer all the same. */
	for (int bits = 47; bits < 64; bits += 8) FAILS(madvise(NULL, 1ul << bits, MADV_DOFORK), EINVAL);
	FAILS(madvise(NULL, 1ul << 47, 22), ENOMEM); /* MADV_POPULATE_READ ends at the hole */
	CHECK(two[0] == 1);
	check();
}

/* What is not for children is not there, and the rest is. */
static void heirs(void)
{
	int status;
	build();
	fill();
	CHECK(!madvise((void *)(data + 2 * PAGE), 2 * PAGE, MADV_DONTFORK));
	pid_t child = fork();
	if (!child) {
		char at;
		for (int page = 2; page < 4; page++) {
			int fds[2];
			CHECK(!pipe(fds));
			FAILS(write(fds[1], (void *)(data + page * PAGE), 1), EFAULT);
		}
		CHECK(mmap((void *)(data + 2 * PAGE), PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
		at = *(volatile char *)(data + 2 * PAGE);
		CHECK(!at && get(1, data) == 77 && get(1, data + 4 * PAGE) == 81);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	CHECK(!madvise((void *)data, data_pages * PAGE, MADV_DONTFORK)); /* a whole mapping */
	child = fork();
	if (!child) {
		int fds[2];
		CHECK(!pipe(fds));
		FAILS(write(fds[1], (void *)data, 1), EFAULT);
		char *own = mmap((void *)data, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		CHECK(own == (char *)data && !*own);
		*own = 3;
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	check();
}

/* A child without the vDSO that its parent has. */
static void bare(void)
{
	int status;
	build();
	fill();
	char *vdso = (char *)getauxval(AT_SYSINFO_EHDR);
	for (int page = 0; page < 64; page++) madvise(vdso + page * PAGE, PAGE, MADV_DONTFORK);
	pid_t child = fork();
	if (!child) _exit(0);
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	check();
}

/* Whether a page is mapped, by the kernel that runs here. */
static int is_mapped(uint64_t page)
{
	unsigned char resident;
	return !mincore((void *)page, PAGE, &resident);
}

/* A file that refuses to be mapped: some kernels have unmapped what was there before they ask it. */
static void refused(void)
{
	struct run run;
	int both[2], rights;
	uint64_t page, value;
	build();
	page = data + 2 * PAGE;
	fill();
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, both));
	for (int ordinary = 0; ordinary < 2; ordinary++) {
		if (ordinary) CHECK(mmap((void *)page, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == (void *)page);
		FAILS((long)mmap((void *)page, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, both[0], 0), ENODEV);
		rights = mprotect((void *)page, 2 * PAGE, PROT_READ);
		CHECK(is_mapped(page) ? !rights : rights == -1 && errno == ENOMEM);
		CHECK(!call(1, GET, page, 0, (uint64_t)&value, &run));
		CHECK(!ordinary && is_mapped(page) ? run.function == 4 : run.function == 3 && run.vector == 14);
		CHECK(ordinary && is_mapped(page) ? run.code == 0x8005 : is_mapped(page) || run.code == 4);
		if (run.function == 3) CHECK(mmap((void *)page, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device, 0) == (void *)page);
		CHECK(!go(1, 3, 0, 0, 0, 0, &run) || run.function == 4);
	}
	check();
}

/* The list of mappings names the device, with the rights that were asked for. */
static void maps(void)
{
	char line[512], rights[8], name[256];
	uint64_t low, high, before = 0, pages = 0;
	int stack = 0;
	build();
	fill();
	FILE *f = fopen("/proc/self/maps", "r");
	CHECK(f);
	while (fgets(line, sizeof line, f)) {
		*name = 0;
		CHECK(sscanf(line, "%lx-%lx %7s %*s %*s %*s %255s", &low, &high, rights, name) >= 3);
		CHECK(low >= before && high > low);
		before = high;
		stack |= !strcmp(name, "[stack]");
		CHECK(!strstr(line, "memfd:sgx"));
		if (strcmp(name, "/dev/sgx_enclave")) continue;
		CHECK(low >= base && high <= base + size && strlen(rights) == 4 && rights[3] == 's');
		if (low == data) CHECK(high == data + data_pages * PAGE && !strcmp(rights, "rw-s"));
		pages += (high - low) / PAGE;
	}
	CHECK(stack && pages > data_pages);
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

/* Memory past page tables: a debug enclave by EDBGRD and EDBGWR, and nobody's zeros. */
static void remote(void)
{
	uint64_t value = 0, two[2] = {0}, own = 5;
	struct iovec mine = {&value, 8}, theirs[2] = {{&own, 8}, {0, 8}}, vector = {two, 16};
	attributes |= 2; /* DEBUG */
	build();
	fill();
	theirs[1].iov_base = (void *)data;
	int mem = open("/proc/self/mem", O_RDWR), copy = dup(mem);
	CHECK(mem >= 0 && copy >= 0);
	for (uint64_t page = 0; page < data_pages; page++) {
		uint64_t at = data + page * PAGE;
		CHECK(pread(page % 2 ? mem : copy, &value, 8, at) == 8 && value == page + 77);
	}
	value = 1234;
	CHECK(pwrite(mem, &value, 8, data) == 8 && get(0, data) == 1234);
	put(0, data, 77);
	CHECK(lseek(mem, data + PAGE, SEEK_SET) == (off_t)(data + PAGE));
	CHECK(read(mem, two, 16) == 16 && two[0] == 78 && !two[1]);
	CHECK(lseek(mem, 0, SEEK_CUR) == (off_t)(data + PAGE + 16));
	CHECK(preadv(mem, &vector, 1, data + 2 * PAGE) == 16 && two[0] == 79);
	/* TCS and SSA frames too; an address that no page is at; ordinary memory as ever */
	CHECK(pread(mem, &value, 8, base) == 8);
	CHECK(mmap((void *)(data + data_pages * PAGE), PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
	FAILS(pread(mem, &value, 8, data + data_pages * PAGE), EIO);
	FAILS(pwrite(mem, &value, 8, data + data_pages * PAGE), EIO);
	CHECK(pread(mem, &value, 8, (off_t)&own) == 8 && value == 5);
	/* The calls that take pages refuse. */
	theirs[0].iov_base = (void *)data;
	FAILS(process_vm_readv(getpid(), &mine, 1, theirs, 1, 0), EFAULT);
	FAILS(process_vm_writev(getpid(), &mine, 1, theirs, 1, 0), EFAULT);
	theirs[0].iov_base = &own; theirs[1].iov_base = (void *)data;
	CHECK(process_vm_readv(getpid(), &vector, 1, theirs, 2, 0) == 8 && two[0] == 5);
	/* A child looks at its parent. */
	pid_t child = fork();
	if (!child) {
		char path[64];
		snprintf(path, sizeof path, "/proc/%d/mem", getppid());
		int other = open(path, O_RDONLY);
		if (other < 0) _exit(errno == EACCES || errno == EPERM ? 0 : 1);
		CHECK(pread(other, &value, 8, data + 3 * PAGE) == 8 && value == 80);
		FAILS(pwrite(other, &value, 8, data), EBADF);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status);
	check();
}

/* An enclave that is not for debugging is read by nobody. */
static void closed(void)
{
	uint64_t value = 7;
	build();
	int mem = open("/proc/self/mem", O_RDWR);
	FAILS(pread(mem, &value, 8, base), EIO); /* TCS */
	for (uint64_t at = data; at < data + data_pages * PAGE; at += PAGE) {
		FAILS(pread(mem, &value, 8, at), EIO);
		FAILS(pwrite(mem, &value, 8, at), EIO);
	}
	CHECK(value == 7);
}

/* The nodes can be looked at and changed as those of devtmpfs. */
static void nodes(void)
{
	struct stat st;
	struct statfs fs;
	char buffer[64];
	const char *names[] = {"/dev/sgx_enclave", "/dev/sgx/enclave", "/dev/sgx_provision", "/dev/sgx/provision"};
	for (int i = 0; i < 4; i++) {
		FAILS(getxattr(names[i], "security.selinux", buffer, sizeof buffer), ENODATA);
		FAILS(lgetxattr(names[i], "system.posix_acl_access", buffer, sizeof buffer), ENODATA);
		CHECK(!listxattr(names[i], buffer, sizeof buffer) && !llistxattr(names[i], NULL, 0));
		CHECK(!statfs(names[i], &fs) && fs.f_bsize);
		CHECK(!utime(names[i], NULL));
		FAILS(truncate(names[i], 0), EINVAL);
		FAILS(mknod(names[i], S_IFCHR | 0600, 0), EEXIST);
		FAILS(open(names[i], O_RDONLY | O_DIRECTORY), ENOTDIR);
	}
	CHECK(!stat("/dev/sgx", &st) && S_ISDIR(st.st_mode) && !access("/dev/sgx", R_OK | X_OK));
	CHECK(!stat("/dev/sgx/", &st) && stat("/dev/sgx_enclave/", &st) && errno != EINTR);
	if (geteuid()) {
		FAILS(chmod("/dev/sgx_enclave", 0600), EPERM);
	} else {
		CHECK(!chmod("/dev/sgx_enclave", 0660) && !stat("/dev/sgx/enclave", &st) && (st.st_mode & 07777) == 0660);
		CHECK(!chown("/dev/sgx_enclave", -1, 7) && !stat("/dev/sgx_enclave", &st) && st.st_gid == 7 && !st.st_uid);
		CHECK(!chmod("/dev/sgx_enclave", 0666));
	}
	int fd = creat("/dev/sgx_enclave", 0600);
	CHECK(fd >= 0 && !fstat(fd, &st) && S_ISCHR(st.st_mode));
}

/* Replaces '@' by the directory that has the links. */
static const char *in_links(const char *pattern)
{
	static char name[512];
	const char *at = strchr(pattern, '@');
	if (!at) return pattern;
	snprintf(name, sizeof name, "%.*s%s%s", (int)(at - pattern), pattern, getenv("SOFTSGX_LINKS"), at + 1);
	return name;
}

/* Every path that leads to a node is the node's, whichever call walks it. */
static void walks(void)
{
	static const char *names[] = {
		"sgx_enclave", "./sgx_enclave", "sgx/enclave", "sgx/../sgx_enclave", "../dev/sgx_enclave", "..//dev/./sgx/./enclave",
		"/dev//sgx_enclave", "/dev/./sgx_enclave", "//dev/sgx_enclave", "/./dev/sgx_enclave", "/tmp/../dev/sgx_enclave",
		"/proc/self/root/dev/sgx_enclave", "/proc/self/cwd/sgx_enclave", "/proc/thread-self/cwd/sgx/enclave",
		"@/absolute", "@/relative", "@/twice", "@/dev/sgx_enclave",
		"@/sgx/enclave", "/proc/self/cwd/..@/twice", "@/named/enclave",
	}, *others[] = {
		"sgx_enclavex", "sgx_enclave/", "sgx_enclave/x", "/tmp/sgx_enclave", "@/loop", "@/nowhere",
		"@/sgx/other", "/dev/sgx/enclave/..", "/proc/self/fd/999/sgx_enclave", "no/../sgx_enclave",
	};
	struct stat st;
	char text[64];
	CHECK(!chdir(in_links("@")));
	symlink("/dev/sgx_enclave", "absolute");
	symlink("dev/../dev/sgx_enclave", "relative");
	symlink("./absolute", "twice");
	symlink("/dev", "dev");
	symlink("/dev/sgx", "sgx");
	mkdir("named", 0700);
	symlink("/dev/sgx_enclave", "named/enclave");
	symlink("loop", "loop");
	symlink("/nowhere/sgx_enclave", "nowhere");
	CHECK(!chdir("/dev"));
	int dev = open("/dev", O_RDONLY | O_DIRECTORY), tmp = open(in_links("@"), O_RDONLY | O_DIRECTORY);
	for (int round = 0; round < 4; round++) /* stubs replace calls that were made often */
		for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
			const char *name = in_links(names[i]);
			int follows = strstr(name, "/absolute") || strstr(name, "/relative") || strstr(name, "/twice") || strstr(name, "/named/");
			for (int flags = 0; flags < 3; flags++) {
				int fd = open(name, flags == 1 ? O_RDWR | O_CREAT : flags == 2 ? O_RDONLY : O_RDWR, 0600);
				if (fd < 0 || fstat(fd, &st) || !S_ISCHR(st.st_mode)) fprintf(stderr, "open %s: %d %d\n", name, fd, errno);
				CHECK(fd >= 0 && !fstat(fd, &st) && S_ISCHR(st.st_mode) && st.st_rdev == 0xa7d);
				close(fd);
			}
			CHECK(!stat(name, &st) && S_ISCHR(st.st_mode));
			CHECK(!lstat(name, &st) && (follows ? S_ISLNK(st.st_mode) : S_ISCHR(st.st_mode)));
			CHECK(!access(name, R_OK | W_OK));
			if (follows) CHECK(readlink(name, text, sizeof text) > 0);
			else FAILS(readlink(name, text, sizeof text), EINVAL);
			FAILS(truncate(name, 0), EINVAL);
			if (follows) FAILS(open(name, O_RDONLY | O_NOFOLLOW), ELOOP);
			FAILS(open(name, O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
		}
	for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
		for (int round = 0; round < 4; round++) {
			const char *name = in_links(others[i]);
			CHECK(open(name, O_RDWR) == -1 && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP));
			CHECK(stat(name, &st) == -1 && access(name, F_OK) == -1);
		}
	CHECK(!chdir("/"));
	for (int round = 0; round < 4; round++) {
		int fd = openat(dev, "sgx_enclave", O_RDWR), copy = dup(dev), also = openat(copy, "sgx/enclave", O_RDWR | O_CREAT, 0600);
		CHECK(fd >= 0 && also >= 0 && !fstat(also, &st) && S_ISCHR(st.st_mode));
		CHECK(!fstatat(dev, "sgx_enclave", &st, 0) && S_ISCHR(st.st_mode));
		CHECK(!fstatat(tmp, "absolute", &st, 0) && S_ISCHR(st.st_mode) && !fstatat(tmp, "absolute", &st, AT_SYMLINK_NOFOLLOW) && S_ISLNK(st.st_mode));
		CHECK(!faccessat(tmp, "twice", R_OK, 0) && !faccessat(dev, "sgx_provision", R_OK, 0));
		FAILS(readlinkat(dev, "sgx_enclave", text, sizeof text), EINVAL);
		FAILS(openat(tmp, "sgx_enclave", O_RDWR), ENOENT);
		FAILS(openat(fd, "sgx_enclave", O_RDWR), ENOTDIR);
		for (int link = 0; link < 2; link++) {
			snprintf(text, sizeof text, link ? "/dev/fd/%d" : "/proc/self/fd/%d", fd);
			CHECK(!stat(text, &st) && S_ISCHR(st.st_mode) && !lstat(text, &st) && S_ISLNK(st.st_mode));
			int again = open(text, O_RDWR);
			uint64_t zero[5] = {0};
			CHECK(again >= 0 && ioctl(again, 0xc028a405, zero) == -1 && errno == EINVAL); /* another, not created */
			close(again);
		}
		close(fd); close(copy); close(also);
	}
	CHECK(lstat("/dev/sgx_enclave", &st) == 0);
}

static uint64_t usage(const char *name)
{
	char path[256], text[64] = {0};
	snprintf(path, sizeof path, "%s/%s", getenv("SOFTSGX_CGROUP"), name);
	int fd = open(path, O_RDONLY);
	CHECK(fd >= 0 && read(fd, text, sizeof text) > 0 && !strncmp(text, "sgx_epc ", 8));
	FAILS(write(fd, text, 1), EPERM);
	close(fd);
	return strtoull(text + 8, NULL, 10);
}

/* A program watches the EPC that it uses, in the files of its group. */
static void watches(void)
{
	struct stat st;
	CHECK(!strcmp(getenv("SOFTSGX_CGROUP"), "/sys/fs/cgroup/softsgx/jobs/a"));
	CHECK(!usage("misc.current") && usage("misc.max") == 64 * PAGE);
	build();
	CHECK(usage("misc.current") >= 10 * PAGE && usage("misc.peak") <= 64 * PAGE);
	CHECK(!stat("/sys/fs/cgroup/softsgx/misc.capacity", &st) && S_ISREG(st.st_mode));
	CHECK(!stat("/sys/fs/cgroup/softsgx/jobs", &st) && S_ISDIR(st.st_mode));
	FAILS(stat("/sys/fs/cgroup/softsgx/misc.max", &st), ENOENT); /* the root has none */
	FAILS(open("/sys/fs/cgroup/softsgx/other/misc.current", O_RDONLY), ENOENT);
	FAILS(open("/sys/fs/cgroup/softsgx/misc.capacity", O_RDWR), EACCES);
}

static void cpuinfo_line(const char *name, char *value, size_t room)
{
	char line[8192];
	FILE *f = fopen("/proc/cpuinfo", "r");
	CHECK(f);
	while (fgets(line, sizeof line, f)) {
		size_t length = strcspn(line, "\t:");
		if (length != strlen(name) || strncmp(line, name, length)) continue;
		snprintf(value, room, "%s ", strchr(line, ':') + 2);
		value[strcspn(value, "\n")] = ' ';
		fclose(f);
		return;
	}
	CHECK(!"a line of that name");
}

/* /proc/cpuinfo tells what CPUID does. */
static void cpuinfo(void)
{
	unsigned a, b, c, d, brand[13] = {0};
	char value[8192], name[64];
	struct stat st;
	__cpuid(0, a, b, c, d);
	cpuinfo_line("vendor_id", value, sizeof value);
	CHECK(!memcmp(value, &b, 4) && !memcmp(value + 4, &d, 4) && !memcmp(value + 8, &c, 4));
	cpuinfo_line("cpuid level", value, sizeof value);
	CHECK((unsigned)atoi(value) == a);
	for (int i = 0; i < 3; i++) __cpuid(0x80000002 + i, brand[4 * i], brand[4 * i + 1], brand[4 * i + 2], brand[4 * i + 3]);
	snprintf(name, sizeof name, "%s ", (char *)brand);
	cpuinfo_line("model name", value, sizeof value);
	CHECK(!strncmp(value, name, strlen(name)));
	__cpuid(1, a, b, c, d);
	cpuinfo_line("stepping", value, sizeof value);
	CHECK((unsigned)atoi(value) == (a & 15));
	cpuinfo_line("flags", value, sizeof value);
	CHECK(!!strstr(value, " avx ") == !!(c >> 28 & 1) && !!strstr(value, " hypervisor ") == (c >> 31));
	__cpuid_count(7, 0, a, b, c, d);
	CHECK(strstr(value, " sgx ") && !!strstr(value, " avx512f ") == (b >> 16 & 1));
	CHECK(!stat("/proc/cpuinfo", &st) && !st.st_size);
}

static void *builds(void *leader)
{
	if (leader) {
		CHECK(!pthread_join(*(pthread_t *)leader, NULL));
		CHECK(!unshare(CLONE_FILES)); /* what it opens is no other thread's */
	}
	build();
	fill();
	check();
	exit(0);
}

/* a thread that is not its process's first one has the device to itself */
static void thread(void)
{
	pthread_t other;
	CHECK(!pthread_create(&other, NULL, builds, NULL));
	pthread_join(other, NULL);
	CHECK(!"the thread has ended alone");
}

/* … and when the first one is gone, and shares no descriptors with it */
static void orphan(void)
{
	static pthread_t first;
	pthread_t other;
	first = pthread_self();
	CHECK(!pthread_create(&other, NULL, builds, &first));
	pthread_exit(NULL);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*go)(void); } all[] = {
		{"calls", calls}, {"links", links}, {"modes", modes}, {"advice", advice}, {"dumps", dumps}, {"heirs", heirs}, {"refused", refused}, {"bare", bare}, {"maps", maps},
		{"remote", remote}, {"closed", closed}, {"nodes", nodes}, {"walks", walks}, {"watches", watches}, {"cpuinfo", cpuinfo},
		{"thread", thread}, {"orphan", orphan},
	};
	CHECK(argc >= 3);
	file = argv[1]; enter = find_enter();
	for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(all[i].name, argv[2])) { all[i].go(); return 0; }
	return 2;
}
