# cadre: `make demo` and `make test` need nothing before them.
BUILD = build
JOBS ?= $(shell nproc)

.PHONY: all dependencies demo test bench format clean

all: dependencies
	@cmake --preset release >$(BUILD)/.configure 2>&1 || (cat $(BUILD)/.configure; exit 1)
	@cmake --build $(BUILD) -j $(JOBS) --target cadre rdata_text

dependencies:
	@scripts/dependencies
	@mkdir -p $(BUILD)

demo: all
	@scripts/demo

test: dependencies
	@scripts/test

# What this machine can do, and how near cadre comes; a few minutes, leave the machine alone.
bench: all
	@for what in roof gemm moe attention decode train; do $(BUILD)/cadre bench $$what || exit 1; done

format:
	clang-format -i $$(git ls-files '*.c' '*.h')

clean:
	rm -rf $(BUILD)
