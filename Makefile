# `make` alone says what there is. Every target prepares what it needs and says so.
SHELL := /bin/bash
.DEFAULT_GOAL := help
INVENTORY ?= inventories/lab
PROFILE ?= cpu
SCENARIO ?=
PROMETHEUS ?= http://127.0.0.1:9091
LABEL ?= now
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qwen-coder
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONUNBUFFERED := 1
# where it is set (images of containers do), every start of Ansible and of the engine would compile all of its code anew
unexport PYTHONDONTWRITEBYTECODE
# ansible refuses to run in a locale that is not UTF-8
export LC_ALL := C.UTF-8

.PHONY: help
help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.complete: requirements/controller.txt requirements/bootstrap.txt scripts/bootstrap
	@scripts/bootstrap

service_src/.venv/.complete: service_src/profiles/cpu.txt service_src/profiles/test.txt | .venv/.complete
	@scripts/service-venv $(CACHE)/wheelhouse

.PHONY: venv
venv: .venv/.complete  ## the control machine's environment (Ansible, Molecule, linters)

.PHONY: deploy
deploy: .venv/.complete  ## the whole chain on the lab, or on INVENTORY=inventories/..., ending with a chat
	@scripts/deploy $(INVENTORY)

.PHONY: validate
validate: .venv/.complete  ## persona, determinism, latency, streaming, cancel, limits and errors of the lab that make deploy made, or of INVENTORY=...
	@scripts/validate $(INVENTORY)

.PHONY: benchmark
benchmark: .venv/.complete service_src/.venv/.complete  ## vLLM and transformers, direct and through the gateway, on the lab or INVENTORY=...; LABEL=... names the run
	@scripts/benchmark $(INVENTORY) $(LABEL)

.PHONY: lab-destroy
lab-destroy: .venv/.complete  ## remove the lab: hosts, network, image, state
	@ansible-playbook -i inventories/lab molecule/lab/destroy.yml -e lab_destroy_all=true
	@rm -rf .cache/facts

.PHONY: check
check: .venv/.complete service_src/.venv/.complete  ## lint, types and unit tests
	@scripts/run-checks

.PHONY: test
test: .venv/.complete service_src/.venv/.complete  ## check, the engine's tests, molecule scenarios; or SCENARIO=..., for those that take half an hour, too: upgrade, transformers_standby, engine_group
	@scripts/run-tests $(SCENARIO)

.PHONY: wheelhouse
wheelhouse: .venv/.complete  ## the wheels of PROFILE=cpu|cuda12|cuda13, to carry to hosts without internet
	@python service_src/scripts/build_wheelhouse.py --profile $(PROFILE) --output $(CACHE)/wheelhouse

.PHONY: lock
lock: .venv/.complete  ## make every lock file anew from its .in file
	@scripts/lock

.PHONY: engine-api
engine-api: .venv/.complete  ## what each profile's vLLM offers, read from its wheel (after make lock, or after a new use of vLLM)
	@python service_src/scripts/engine_api.py

.PHONY: docs
docs: .venv/.complete  ## what is made from code: role reference, rules of the objectives, dashboards; and the benchmark's document from its results
	@python scripts/role_reference.py
	@python scripts/slo_rules.py
	@python scripts/dashboards.py
	@python scripts/benchmark_report.py document

.PHONY: prometheus-scale
prometheus-scale: .venv/.complete  ## what Prometheus takes for 50 nodes (docs/observability.md), about 8 minutes
	@python scripts/prometheus_scale.py --history 72

.PHONY: pictures
pictures: .venv/.complete  ## pictures of the dashboards, from PROMETHEUS=http://127.0.0.1:9091 (through ssh -L), into docs/dashboards
	@python scripts/dashboard_pictures.py --url $(PROMETHEUS)

.PHONY: clean
clean:  ## remove this checkout's environments and caches (the lab stays: make lab-destroy)
	@rm -rf .venv .cache .ansible service_src/.venv .pytest_cache .mypy_cache .ruff_cache
