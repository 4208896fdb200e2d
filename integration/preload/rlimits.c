/*
 * Answers prlimit(2) for other processes from /proc/PID/limits where the
 * kernel refuses it (EPERM without CAP_SYS_RESOURCE). Only for test machines
 * whose root lacks that capability; CRIU is started with it by the harness.
 *
 * CRIU reads limits with prlimit() or with syscall(SYS_prlimit64), depending
 * on its version; both are covered. Limits are only read this way, not set.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In the order of RLIMIT_*, as the kernel's fs/proc/base.c names them. */
static const char *const names[RLIM_NLIMITS] = {
	"Max cpu time", "Max file size", "Max data size", "Max stack size",
	"Max core file size", "Max resident set", "Max processes", "Max open files",
	"Max locked memory", "Max address space", "Max file locks", "Max pending signals",
	"Max msgqueue size", "Max nice priority", "Max realtime priority", "Max realtime timeout",
};

/* CRIU starts tar and others: they are to run without this. */
__attribute__((constructor)) static void forget(void)
{
	unsetenv("LD_PRELOAD");
}

static rlim_t parse(const char *text)
{
	return strcmp(text, "unlimited") ? strtoull(text, NULL, 10) : RLIM_INFINITY;
}

static int read_limits(pid_t pid, unsigned resource, struct rlimit *old)
{
	char line[256], soft[32], hard[32];
	int found = -1;

	snprintf(line, sizeof(line), "/proc/%d/limits", pid);
	FILE *file = fopen(line, "re");
	while (file && resource < RLIM_NLIMITS && fgets(line, sizeof(line), file)) {
		size_t length = strlen(names[resource]);
		if (strncmp(line, names[resource], length) == 0 &&
		    sscanf(line + length, "%31s %31s", soft, hard) == 2) {
			old->rlim_cur = parse(soft);
			old->rlim_max = parse(hard);
			found = 0;
		}
	}
	if (file)
		fclose(file);
	if (found)
		errno = EPERM;
	return found;
}

/* The system call itself: syscall(3) is overridden below. */
static long raw(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c, x3 __asm__("x3") = d, x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
#error "no system call sequence for this architecture"
#endif
}

long syscall(long number, ...)
{
	va_list list;
	long a[6];

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	long result = raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_prlimit64 && result == -EPERM && a[0] && !a[2] && a[3])
		return read_limits(a[0], a[1], (struct rlimit *)a[3]);
	if (result < 0 && result > -4096) {
		errno = -result;
		return -1;
	}
	return result;
}

int prlimit(pid_t pid, __rlimit_resource_t resource, const struct rlimit *new, struct rlimit *old)
{
	return syscall(SYS_prlimit64, pid, resource, new, old, 0, 0);
}

int prlimit64(pid_t pid, __rlimit_resource_t resource, const struct rlimit64 *new, struct rlimit64 *old)
{
	return syscall(SYS_prlimit64, pid, resource, new, old, 0, 0);
}
