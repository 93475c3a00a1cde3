#!/usr/bin/env bash
# Everything to run Trireme in one folder and one archive: the programs, the MPI with its plugins, HDF5 and all other libraries but
# the C library. Runs where nothing is installed, on any x86-64 Linux with glibc 2.36 or newer (Debian 12, Ubuntu 23.04, RHEL 10).
#
#   bash slurm/bundle.sh [--gpu] [FOLDER]        makes FOLDER (target/bundle/trireme) and FOLDER.tar.xz
#   tar -xf trireme.tar.xz; trireme/bin/trireme-pretrain --help; trireme/bin/mpirun -n 2 trireme/bin/trireme-pretrain ..
#
# --gpu: what tests/gpu.sh runs on a machine with a GPU and without a compiler, and no more, for the archive travels: the programs that
# train and generate, the test of the CUDA device and its benches (bin/test/NAME, bin/bench/NAME).
# On a cluster with an interconnect of its own the MPI of that cluster is faster: build there instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/env.sh
source slurm/env.sh
case ":$PATH:" in *":$HOME/.cargo/bin:"*) ;; *) export PATH=$PATH:$HOME/.cargo/bin ;; esac

die() { echo "bundle: $1" >&2; exit "${2:-1}"; }

with_gpu=0 out=target/bundle/trireme
for word in "$@"; do
  case $word in
    --gpu) with_gpu=1 ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) die "unknown option $word (there is --gpu)" 2 ;;
    *) out=$word ;;
  esac
done
if [ -e "$out" ] && [ ! -e "$out/bin/trireme-pretrain" ]; then
  die "$out is there and is no bundle; name another folder or move it away" 2
fi
for tool in ldd strip xz tar; do command -v $tool >/dev/null || die "$tool is missing: bash slurm/install.sh"; done

programs=(--bins)
tests=() # "test/NAME FILE", "bench/NAME FILE"
if [ $with_gpu = 1 ]; then
  programs=(--bin trireme-pretrain --bin trireme-generate --bin trireme-tokenize --bin trireme-train-tokenizer)
  built() { sed -n 's/.*"kind":\["'"$1"'"\].*"executable":"\([^"]*\)-[0-9a-f]*".*/\1 &/p' | sed -n 's/^[^ ]*\/\([^ /]*\) .*"executable":"\([^"]*\)".*/\1 \2/p' | sort -u; }
  while IFS= read -r line; do tests+=("test/$line"); done < <(cargo test --release --test gpu --no-run --message-format=json --quiet | built test)
  while IFS= read -r line; do tests+=("bench/$line"); done < <(cargo bench --bench gpu --bench decode --bench train_step --no-run --message-format=json --quiet | built bench)
  [ ${#tests[@]} = 4 ] || die "the test and the three benches of the GPU did not build"
fi
cargo build --release "${programs[@]}" --quiet

new=$out.new
rm -rf "$new"
mkdir -p "$new"/{bin,libexec,lib}

# Libraries of a file, but those that must match the running kernel and C library.
libraries() {
  ldd "$@" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|libutil|ld-linux[^/]*)\.so' || true
}

# A program, libexec/PATH, and a script bin/PATH that runs it with the bundle's libraries; srun and mpirun start it like any program.
program() { # FILE PATH
  local up=..
  case $2 in */*) up=../.. ;; esac
  mkdir -p "$(dirname "$new/bin/$2")" "$(dirname "$new/libexec/$2")"
  strip --strip-debug -o "$new/libexec/$2" "$1"
  printf '#!/bin/sh\nhere=$(cd "$(dirname "$(readlink -f "$0")")/%s" && pwd)\n. "$here/env.sh"\nexec "$here/libexec/%s" "$@"\n' "$up" "$2" >"$new/bin/$2"
  chmod +x "$new/bin/$2"
  objects+=("$1")
}

objects=()
for path in target/release/trireme-*; do
  if [ $with_gpu = 1 ] && [[ " ${programs[*]} " != *" $(basename "$path") "* ]]; then continue; fi
  if [ -x "$path" ] && [ -f "$path" ]; then program "$path" "$(basename "$path")"; fi
done
for line in ${tests[@]+"${tests[@]}"}; do program "${line#* }" "${line%% *}"; done

# The MPI: its launchers, plugins and texts, under the names that OpenMPI and PMIx read their places from.
settings=()
if command -v ompi_info >/dev/null; then
  place() { ompi_info --parsable --path "$1" | cut -d: -f3; }
  plugins=$(place pkglibdir)
  mkdir -p "$new"/openmpi/{plugins,share,etc,libexec} "$new/pmix"
  cp -L "$plugins"/*.so "$new/openmpi/plugins/"
  [ ! -d "$(place pkgdatadir)" ] || cp -rL "$(place pkgdatadir)/." "$new/openmpi/share/"
  [ ! -d "$(place sysconfdir)" ] || cp -rL "$(place sysconfdir)/." "$new/openmpi/etc/"
  for name in orterun orted; do
    path=$(command -v $name) && program "$path" $name
  done
  ln -s orterun "$new/bin/mpirun"
  objects+=("$plugins"/*.so)
  # shellcheck disable=SC2016
  settings+=('export OPAL_PREFIX="$here" OPAL_BINDIR="$here/bin" OPAL_LIBDIR="$here/lib" OPAL_PKGLIBDIR="$here/openmpi/plugins"'
    'export OPAL_PKGDATADIR="$here/openmpi/share" OPAL_SYSCONFDIR="$here/openmpi/etc"'
    '# mpirun wants a remote shell even for one machine.'
    'command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent="${OMPI_MCA_plm_rsh_agent:-false}"')
  pmix=$(libraries "$plugins"/*.so | grep -m1 '/libpmix\.so' || true)
  pmix_plugins=$(dirname "$(readlink -f "${pmix:-/nowhere}")")/pmix
  if [ -d "$pmix_plugins" ]; then
    cp -L "$pmix_plugins"/*.so "$new/pmix/"
    objects+=("$pmix_plugins"/*.so)
    # shellcheck disable=SC2016
    settings+=('export PMIX_PREFIX="$here" PMIX_LIBDIR="$here/lib" PMIX_PKGLIBDIR="$here/pmix"')
  fi
else
  echo "bundle: no ompi_info, so no MPI plugins and no mpirun: the bundle runs alone or under the srun of a cluster with the same MPI" >&2
fi

while IFS= read -r path; do cp -L "$path" "$new/lib/"; done < <(libraries "${objects[@]}")
{
  echo '# Sourced by the programs of bin/ with $here set to this folder.'
  # What they start themselves (the Python of a bench) gets its own libraries back.
  # shellcheck disable=SC2016
  echo 'export TRIREME_OUTER_LIBRARY_PATH="${LD_LIBRARY_PATH-}"'
  # shellcheck disable=SC2016
  echo 'export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'
  printf '%s\n' ${settings[@]+"${settings[@]}"}
} >"$new/env.sh"
cp -r slurm/recipes "$new/recipes"
# Test programs look for their data where they were built: tests/gpu.sh makes that place if it must.
pwd -P >"$new/built_in"

rm -rf "$out"
mv "$new" "$out"
tar -C "$(dirname "$out")" -c "$(basename "$out")" | xz -6 -T0 >"$out.tar.xz"
echo "bundle: $out ($(du -sh "$out" | cut -f1), $(find "$out/bin" -type f | wc -l) programs, $(find "$out/lib" -type f | wc -l) libraries), $out.tar.xz ($(du -h "$out.tar.xz" | cut -f1))"
