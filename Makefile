# Thin names over tools/dev.py, which also works without make.
.PHONY: tour demo dev check test modes docs format
tour demo test modes docs format:
	python3 tools/dev.py $@
dev:
	python3 tools/dev.py setup
check:
	python3 tools/dev.py quick
