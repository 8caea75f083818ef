/*
 * ownenclu ENCLAVE MODE: code with an ENCLU of its own that the program writes to, moves, replaces,
 * or has a copy of after fork and exec; with vdso:MODE, calls by the vDSO instead.
 */
#include "sgx.h"

/* A page of code of the program's file, with one way to enter; it needs nothing that is near. */
__asm__(".section .text.page,\"ax\",@progbits\n.balign 4096\npage:\n.fill 256,1,0x90\n"
	"paged:\n push %rbp\n mov %rsp,%rbp\n push %rbx\n mov 16(%rbp),%rbx\n mov (%rbx),%rbx\n"
	" lea 1f(%rip),%rcx\nload: mov $2,%eax\nenclu: .byte 0x0f,0x01,0xd7\n mov 16(%rbp),%rbx\n"
	"count: movl $4,8(%rbx)\n mov -8(%rbp),%rbx\n leave\n mov $0,%eax\n ret\n1: .byte 0x0f,0x01,0xd7\n.balign 4096\n.text\n");
extern char page[], load[], count[];
extern enter_t paged;
static char kept[4096], *at = page;
static enter_t *vdso;

static void calls(uint64_t many)
{
	struct run run;
	enter = vdso ? vdso : (enter_t *)(at + ((char *)paged - page));
	for (uint64_t i = 0; i < many; i++) {
		CHECK(!call(0, PUT, data + i % data_pages * PAGE, i, 0, &run) && run.function == 4);
		uint64_t value = ~i;
		CHECK(!call(0, GET, data + i % data_pages * PAGE, 0, (uint64_t)&value, &run) && value == i);
	}
}

/* It finds its own bytes when it may write, and what it writes counts. */
static void writable(void)
{
	struct run run;
	for (int round = 0; round < 3; round++) {
		CHECK(!mprotect(page, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
		CHECK(!memcmp(page, kept, PAGE));
		calls(50);
		CHECK(!memcmp(page, kept, PAGE));
		count[3] = 9; /* what it stores behind ENCLU */
		CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 9);
		load[1] = 1; /* no leaf: #GP */
		load[1] = 2;
		count[3] = 4;
		CHECK(!mprotect(page, PAGE, PROT_READ | PROT_EXEC));
		calls(50);
	}
}

static void moved(void)
{
	for (int round = 0; round < 3; round++) {
		char *to = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(to != MAP_FAILED && mremap(at, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
		at = to;
		CHECK(!memcmp(at, kept, PAGE));
		calls(50);
	}
}

/* Other code at the same place; then the code of the file again. */
static void replaced(const char *program)
{
	struct run run;
	uint64_t offset = 0;
	Dl_info info;
	CHECK(dladdr(page, &info));
	offset = page - (char *)info.dli_fbase;
	for (int round = 0; round < 3; round++) {
		char *new = mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		CHECK(new == page);
		memcpy(page, kept, PAGE);
		count[3] = 9;
		CHECK(!mprotect(page, PAGE, PROT_READ | PROT_EXEC));
		for (int i = 0; i < 20; i++) CHECK(!call(0, NOP, 0, 0, 0, &run) && run.function == 9);
		int fd = open(program, O_RDONLY);
		CHECK(fd >= 0 && mmap(page, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, offset) == page);
		close(fd);
		calls(50);
		CHECK(!madvise(page, PAGE, MADV_DONTNEED)); /* has the bytes of the file again */
		CHECK(!memcmp(page, kept, PAGE));
		calls(50);
	}
}

static void forked(void)
{
	int status;
	for (int round = 0; round < 3; round++) {
		pid_t child = fork();
		CHECK(child >= 0);
		if (!child) {
			calls(50);
			pid_t grandchild = fork();
			if (!grandchild) { calls(50); _exit(0); }
			CHECK(waitpid(grandchild, &status, 0) == grandchild && !status);
			calls(50);
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child && !status);
		calls(50);
	}
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	file = argv[1];
	if (!strncmp(argv[2], "vdso:", 5)) argv[2] += 5, vdso = find_enter();
	memcpy(kept, page, PAGE);
	build();
	calls(50);
	if (!strcmp(argv[2], "writable")) writable();
	else if (!strcmp(argv[2], "moved")) moved();
	else if (!strcmp(argv[2], "replaced")) replaced(argv[0]);
	else if (!strcmp(argv[2], "forked")) forked();
	else if (!strcmp(argv[2], "executed")) execl(argv[0], argv[0], argv[1], "once", NULL);
	return 0;
}
