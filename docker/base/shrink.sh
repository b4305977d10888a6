#!/usr/bin/env bash
# shrink.sh MARK: of what apt-get installed after MARK, keep what compiles one C file against Python.h.
#
# gcc brings link-time optimization, coverage and sanitizers; they are two thirds of it, and Triton's launcher is one
# translation unit at -O3. tests/image compiles one in the finished image. Files of the base image are left alone:
# their removal would take a layer's room and not give it back.
set -euo pipefail

[ $# -eq 1 ] && [ -e "$1" ] || { echo "usage: shrink.sh MARK (a file made when the step began)" >&2; exit 2; }
mark=$1
shopt -s nullglob

apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
# Records of this very run. Emptied and not removed: the mark of a removed file carries the date of its removal.
find /var/log /var/cache/debconf /var/cache/ldconfig -type f \( -path '/var/log/*' -o -name '*-old' -o -name aux-cache \) \
  -exec truncate --size 0 {} +

unused=(
  /usr/lib/gcc/*/*/{lto1,g++-mapper-server,libgcov.a}* /usr/lib/gcc/*/*/lib{a,t,l,ub,hwa}san*
  /usr/bin/*{lto-dump,gcov,ld.gold,gold,dwp,gprof}*
  /usr/lib/*/lib{a,t,l,ub,hwa}san.so* /usr/lib/*/libgprofng*
  /usr/lib/*/lib{c,m-2.*,mvec,resolv,anl,rt,pthread,dl,util,BrokenLocale,g}.a*
  /usr/share/{man*,info*,locale*}
)
mapfile -t unused < <(printf '%s\n' "${unused[@]}" | sort -u) # patterns overlap
# A package gives its files the date at which it was made; when they came here is their ctime.
find "${unused[@]}" -not -type d -cnewer "$mark" -delete
find /usr/share/doc -type f -not -name copyright -cnewer "$mark" -delete
