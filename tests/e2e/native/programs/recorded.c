/*
 * Uses pages of enclaves in an order that its arguments tell, for tests of recordings:
 *
 *	gN	load from data page N of the current enclave
 *	pN	store to it
 *	oN	load from it outside the enclave
 *	/	store to the last data page, the next time to the one before it, and so on; then make a
 *		call that the supervisor handles
 *	n	build another enclave, which becomes the current one
 *	sN	let enclave N be the current one
 *	u	unmap and close the current enclave
 *	f	do the rest in a child, and wait for it
 *	k	end by SIGKILL
 *	r	begin again with the first word
 */
#include "sgx.h"

static struct enclave { uint64_t base, size, data, pages; int device; } known[16];
static int made, ends;

static void select_enclave(int number)
{
	struct enclave *e = &known[number];
	base = e->base; size = e->size; data = e->data; data_pages = e->pages; device = e->device;
}

static void make_enclave(void)
{
	build();
	known[made++] = (struct enclave){base, size, data, data_pages, device};
}

static void call_supervisor(void)
{
	struct stat info;
	CHECK(!stat("/dev/sgx_enclave", &info));
}

int main(int argc, char **argv)
{
	volatile uint64_t seen;
	CHECK(argc > 2);
	file = argv[1];
	enter = find_enter();
	make_enclave();
	call_supervisor();
	for (int i = 2; i < argc; i++) {
		uint64_t number = strtoul(argv[i] + 1, NULL, 10), at = data + number * PAGE;
		switch (*argv[i]) {
		case 'g': get(0, at); break;
		case 'p': put(0, at, i); break;
		case 'o': seen = *(volatile uint64_t *)at; break;
		case '/': put(0, data + (data_pages - ++ends) * PAGE, i); call_supervisor(); break;
		case 'n': make_enclave(); break;
		case 's': select_enclave(number); break;
		case 'u': munmap((void *)base, size); close(device); break;
		case 'f': {
			int status;
			pid_t child = fork();
			CHECK(child >= 0);
			if (!child) break;
			CHECK(waitpid(child, &status, 0) == child && !status);
			return 0;
		}
		case 'k': raise(SIGKILL); break;
		case 'r': i = 1; break;
		default: CHECK(!"a known word");
		}
	}
	(void)seen;
	return 0;
}
