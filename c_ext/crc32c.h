/* CRC-32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720, appendix B.4). */
#ifndef HPCFT_CRC32C_H
#define HPCFT_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Prepare the tables and choose the implementation. Call once, before the others, in one thread. */
void crc32c_start(void);

/* The checksum of what `crc` is the checksum of (0 for nothing) followed by `length` bytes. */
uint32_t crc32c(uint32_t crc, const void *data, size_t length);

/* The checksum of two stretches of data, the second `length` bytes long, from that of each. */
uint32_t crc32c_combine(uint32_t first, uint32_t second, uint64_t length);

/* "sse4.2", "armv8" or "portable": what crc32c() uses. */
const char *crc32c_backend(void);

/* As crc32c(), without special instructions; for tests. */
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t length);

#endif
