/*
 * Faults without end: every page of an enclave that is larger than its EPC, one after the other, again and again.
 * Each page counts how often it was visited; a page that has lost a visit ends the program.
 * usage: longrun ENCLAVE VISITS
 */
#include "sgx.h"

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	file = argv[1];
	enter = find_enter();
	build();
	uint64_t passes = (strtoull(argv[2], NULL, 10) + data_pages - 1) / data_pages;
	for (uint64_t pass = 0; pass < passes; pass++) {
		struct run run;
		int ret = call(0, SWEEP, data, data_pages, pass, &run);
		if (ret || run.function != 4)
			fprintf(stderr, "pass %lu: result %d function %u vector %u code %x address %lx\n",
				pass, ret, run.function, run.vector, run.code, run.address);
		CHECK(!ret && run.function == 4);
	}
	return 0;
}
