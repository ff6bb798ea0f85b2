# What a person types. Everything else is in tools/ (`tools/setup --help`) and docs/TESTING.md.

.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench

help:
	@echo "make demo    move a redis server under load from one host to another, on this machine"
	@echo "make test    every test: unit, live migrations, soft-dirty in a VM (needs root)"
	@echo "make bench   the downtime table, beside plain CRIU in the same run (needs root)"
	@echo "make setup   only install what these need (they do it themselves)"
	@echo "make build   only build the release binaries"

setup:
	@tools/setup

build:
	cargo build --workspace --release --locked

demo:
	@tools/setup --no-vm
	cargo build --workspace --release --locked
	@tools/demo

test:
	@tools/test

bench:
	@tools/setup --no-vm
	cargo build --workspace --release --locked
	cargo run --package pageferry-benches --release --locked -- downtime
