/*
 * Part of `make static STATIC_LIBC=1`.  A static libc loads what /etc/nsswitch.conf
 * names (resolve, myhostname, sss, ...) from the system, made for another libc,
 * and dies of it.  So it is to look where it can by itself.
 *
 * SPDX-License-Identifier: BSD-2-Clause
 */
#include <nss.h>

static __attribute__((constructor)) void
nss_without_modules(void)
{
	__nss_configure_lookup("hosts", "files dns");
	__nss_configure_lookup("passwd", "files");
	__nss_configure_lookup("group", "files");
	__nss_configure_lookup("services", "files");
	__nss_configure_lookup("protocols", "files");
}
