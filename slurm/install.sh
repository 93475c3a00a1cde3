#!/usr/bin/env bash
# Installs what Trireme needs on Debian 12, once; says one line per thing done, and nothing when nothing is missing.
#
#   bash slurm/install.sh              what a build and a run need: C compiler, Open MPI, HDF5, libclang (and checks for Rust)
#   bash slurm/install.sh tests        also what the tests need: Python's venv, a C++ compiler, ip, ps and xz
#   bash slurm/install.sh cluster      also the one-machine SLURM cluster of slurm/dev-cluster.sh
#
# Without root it prints the one command for an administrator. On other systems it looks for the programs themselves.
set -euo pipefail

# libc6-dev: gcc only recommends it. libclang: bindgen reads mpi.h with it.
BUILD=(gcc libc6-dev pkg-config libclang-dev libopenmpi-dev openmpi-bin libhdf5-dev)
TESTS=(python3-venv g++ procps iproute2 xz-utils)
# libpmix-dev: SLURM's PMIx plugin opens libpmix.so, a name that only this package has.
CLUSTER=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmix2 libpmix-dev iproute2 procps hostname)
RUST_MINOR=90 # rust-version in Cargo.toml: 1.90

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# missing_packages NAME..: those that dpkg does not know as installed, one a line.
missing_packages() {
  local name
  for name in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null || true)" = installed ] || echo "$name"
  done
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}

# Packages of daemons start them at once where an init system runs; policy-rc.d (Debian's own switch) keeps them down.
install_packages() {
  local policy=/usr/sbin/policy-rc.d log started=$SECONDS code=0 ours=
  log=$(mktemp)
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    ours=1
  fi
  # The package lists of a fresh container are empty or old: a first failure only means that they must be fetched.
  apt_install "$@" >"$log" 2>&1 || { apt-get update -qq >>"$log" 2>&1 && apt_install "$@" >>"$log" 2>&1; } || code=$?
  [ -z "$ours" ] || rm -f $policy
  if [ $code -ne 0 ]; then
    tail -n 5 "$log" >&2
    die "apt-get could not install $*; the whole log is $log"
  fi
  rm -f "$log"
  say "installed $* ($((SECONDS - started)) s)"
}

debian_packages() {
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    die "packages are missing; have an administrator run: apt-get install --no-install-recommends ${missing[*]}"
  fi
  install_packages "${missing[@]}"
}

# Not Debian: a cluster's own modules usually have everything.
other_system() {
  local missing=()
  command -v cc >/dev/null || missing+=("a C compiler (cc)")
  command -v mpicc >/dev/null || missing+=("Open MPI with its compiler wrapper (mpicc)")
  command -v pkg-config >/dev/null || missing+=("pkg-config")
  command -v h5cc >/dev/null || pkg-config --exists hdf5 2>/dev/null || missing+=("HDF5 with its headers (h5cc)")
  [ ${#missing[@]} -gt 0 ] || return 0
  local list
  list=$(printf '%s, ' "${missing[@]}")
  die "not a Debian system, and not found: ${list%, }; load the modules of your site (slurm/env.sh has a place for them)"
}

rust() {
  local found
  command -v cargo >/dev/null || die "no cargo: install Rust from https://rustup.rs (as yourself, no root needed), then run this again"
  found=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
  [ "${found:-0}" -ge $RUST_MINOR ] || die "found $(cargo --version), needed is 1.$RUST_MINOR or later: run rustup update stable"
}

wanted=("${BUILD[@]}")
for part in "$@"; do
  case $part in
    tests) wanted+=("${TESTS[@]}") ;;
    cluster) wanted+=("${CLUSTER[@]}") ;;
    *) die "no such part: $part (tests, cluster)" ;;
  esac
done
# rustup puts cargo here; a shell that is not a login shell may not have it in its path.
case ":$PATH:" in *":$HOME/.cargo/bin:"*) ;; *) PATH=$PATH:$HOME/.cargo/bin ;; esac
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then debian_packages "${wanted[@]}"; else other_system; fi
rust
