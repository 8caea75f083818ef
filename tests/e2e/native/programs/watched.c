/*
 * By which way ever a process has come to a device: its descriptor is a character device, and the
 * list of mappings tells of what it has mapped, unmapped and protected.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) { fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #what, errno); _exit(1); } } while (0)
#define SIZE 0x10000

static char *place;
static volatile int device = -1, go;

static int open_device(void)
{
	int fd = open("/dev/sgx_enclave", O_RDWR);
	CHECK(fd >= 0);
	return fd;
}

/* fstat itself: the C library makes newfstatat of it, which stops always. */
static int is_device(int fd)
{
	struct stat it;
	CHECK(!syscall(SYS_fstat, fd, &it));
	return S_ISCHR(it.st_mode);
}

/* How many mappings of the device the kernel's list has. */
static int mapped(void)
{
	char line[512];
	int found = 0;
	FILE *maps = fopen("/proc/self/maps", "r");
	CHECK(maps);
	while (fgets(line, sizeof line, maps)) found += strstr(line, "/dev/sgx_enclave") || strstr(line, "memfd:sgx_enclave");
	fclose(maps);
	return found;
}

static void map(int fd)
{
	place = mmap(NULL, SIZE, PROT_NONE, MAP_SHARED, fd, 0);
	CHECK(place != MAP_FAILED);
}

/* What the driver does not hear of is not in the list. */
static void use(void)
{
	CHECK(mapped() == 1);
	CHECK(!mprotect(place, 4096, PROT_READ) && mapped() == 2);
	CHECK(!munmap(place + SIZE / 2, 4096) && mapped() == 3);
	CHECK(!munmap(place, SIZE) && mapped() == 0);
}

static void opened(void)
{
	int fd = open_device();
	CHECK(is_device(fd));
	map(fd);
	use();
}

static void *opens(void *unused)
{
	device = open_device();
	map(device);
	return unused;
}

static void by_a_thread(void)
{
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, opens, NULL) && !pthread_join(thread, NULL));
	CHECK(is_device(device));
	use();
}

static void *filtered(void *unused)
{
	struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog program = {1, allow};
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
	go = 1;
	while (go == 1);
	CHECK(is_device(device));
	use();
	return unused;
}

/* Threads with filters of their own cannot be given one all at once. */
static void beside_a_filtered_thread(void)
{
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, filtered, NULL));
	while (!go);
	opens(NULL);
	go = 2;
	CHECK(!pthread_join(thread, NULL));
}

static void by_a_vfork_child(void)
{
	if (!vfork()) {
		opens(NULL);
		_exit(0);
	}
	/* The first call of the parent, and it does not stop without a device. */
	CHECK(madvise(place, SIZE, MADV_COLD) == -1 && errno == EINVAL);
	use();
}

static int open_and_map(void *unused)
{
	opens(unused);
	go = 1;
	while (go == 1);
	return 0;
}

static int waits_and_maps(void *unused)
{
	while (!go);
	opens(unused);
	go = 2;
	while (go == 2);
	return 0;
}

/* The child of vfork has ended, and another process still shares the memory. */
static void by_a_child_of_a_vfork_child(void)
{
	static char stack[1 << 16] __attribute__((aligned(16)));
	if (!vfork()) {
		CHECK(clone(waits_and_maps, stack + sizeof stack, CLONE_VM | CLONE_FILES | CLONE_PARENT | SIGCHLD, NULL) > 0);
		_exit(0);
	}
	go = 1;
	while (go == 1);
	use();
	go = 3;
	for (int each = 0; each < 2; each++) {
		int status;
		CHECK(wait(&status) > 0 && !status);
	}
}

static void *executes(void *unused)
{
	go = 1;
	execl("/bin/true", "true", NULL);
	return unused;
}

/* A thread that is not the first executes a program while another one opens the device. */
static void beside_execve(void)
{
	for (int each = 0; each < 100; each++) {
		int status, pid = fork();
		pthread_t thread;
		if (!pid) {
			CHECK(!pthread_create(&thread, NULL, executes, NULL));
			while (!go);
			for (int turns = 0; turns < each * 200; turns++) __asm__ volatile("");
			open_device();
			pause();
		}
		CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && !status);
	}
}

/* A process that shares memory and descriptors, and is no thread. */
static void by_a_clone(void)
{
	static char stack[1 << 16] __attribute__((aligned(16)));
	int status, pid = clone(open_and_map, stack + sizeof stack, CLONE_VM | CLONE_FILES | SIGCHLD, NULL);
	CHECK(pid > 0);
	while (!go);
	CHECK(is_device(device));
	use();
	go = 2;
	CHECK(waitpid(pid, &status, 0) == pid && !status);
}

static void send_descriptor(int socket, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof fd)] = {0};
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	CHECK(sendmsg(socket, &message, 0) == 1);
}

static int receive_descriptor(int socket)
{
	int fd;
	char byte, control[CMSG_SPACE(sizeof fd)];
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	CHECK(recvmsg(socket, &message, 0) == 1);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

static void by_a_message(void)
{
	int sockets[2], status, pid;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
	pid = fork();
	if (!pid) {
		send_descriptor(sockets[1], open_device());
		_exit(0);
	}
	device = receive_descriptor(sockets[0]);
	map(device);
	CHECK(is_device(device));
	use();
	CHECK(waitpid(pid, &status, 0) == pid && !status);
}

static void after_fork(void)
{
	int status, pid, fd = open_device();
	map(fd);
	pid = fork();
	CHECK(is_device(fd));
	use();
	if (!pid) {
		if (!fork()) opened();
		else wait(NULL);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status);
}

static void after_execve(char *program)
{
	char number[16];
	snprintf(number, sizeof number, "%d", open_device());
	execl(program, program, "inherited", number, NULL);
}

/* Children without the vDSO of their parent: one that needs nothing of it, and one that does. */
static void bare(void)
{
	char *vdso = (char *)getauxval(AT_SYSINFO_EHDR);
	for (int page = 0; page < 64; page++) madvise(vdso + page * 4096, 4096, MADV_DONTFORK);
	for (int needs = 0; needs < 2; needs++) {
		int status, pid = fork();
		if (!pid && needs) open("/dev/sgx_enclave", O_RDWR);
		if (!pid) __asm__ volatile("syscall" : : "a"(SYS_exit_group), "D"(7)); /* the loader may be missing, too */
		CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
		CHECK(needs ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 7 << 8);
	}
	opened();
}

int main(int count, char **arguments)
{
	char *scenario = arguments[1];
	if (!strcmp(scenario, "bare")) { bare(); return 0; }
	if (!strcmp(scenario, "opened")) opened();
	else if (!strcmp(scenario, "thread")) by_a_thread();
	else if (!strcmp(scenario, "filtered")) beside_a_filtered_thread();
	else if (!strcmp(scenario, "vfork")) by_a_vfork_child();
	else if (!strcmp(scenario, "after_vfork")) by_a_child_of_a_vfork_child();
	else if (!strcmp(scenario, "beside_execve")) beside_execve();
	else if (!strcmp(scenario, "clone")) by_a_clone();
	else if (!strcmp(scenario, "message")) by_a_message();
	else if (!strcmp(scenario, "fork")) after_fork();
	else if (!strcmp(scenario, "execve")) after_execve(arguments[0]);
	else if (!strcmp(scenario, "inherited") && count == 3) {
		CHECK(is_device(atoi(arguments[2])));
		map(atoi(arguments[2]));
		use();
	} else return 2;
	return 0;
}
