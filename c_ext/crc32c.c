#include "crc32c.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE __attribute__((target("sse4.2")))
#define STEP64(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define STEP8(crc, byte) _mm_crc32_u8((crc), (byte))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define HARDWARE __attribute__((target("+crc")))
#define STEP64(crc, word) __crc32cd((crc), (word))
#define STEP8(crc, byte) __crc32cb((crc), (byte))
#endif

#define POLYNOMIAL 0x82F63B78u

/*
 * Polynomials over GF(2) are kept reflected, as the checksum is: bit 31 is the coefficient of x^0.
 * "Shifting" a checksum by n bytes means multiplying it by x^(8n), which is what n zero bytes after
 * the data do to it.
 */

/* Bytes of each of the three stretches whose checksums are computed side by side. The instruction
 * takes three cycles to give its result and can start every cycle. */
#define LONG_STRETCH 8192
#define SHORT_STRETCH 256

static uint32_t bytewise[8][256];
static uint32_t shift_long[4][256];
static uint32_t shift_short[4][256];
static uint32_t powers[64]; /* x^(2^k) */
static int use_hardware;

static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = b & 1 ? (b >> 1) ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

/* x^(8 * bytes) */
static uint32_t shift_by(uint64_t bytes) {
    uint32_t result = 1u << 31;
    for (int k = 3; bytes; bytes >>= 1, k++)
        if (bytes & 1)
            result = multiply(result, powers[k]);
    return result;
}

uint32_t crc32c_combine(uint32_t first, uint32_t second, uint64_t length) {
    return multiply(shift_by(length), first) ^ second;
}

static uint64_t load64(const unsigned char *at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

uint32_t crc32c_portable(uint32_t crc, const void *data, size_t length) {
    const unsigned char *at = data;
    crc = ~crc;
    for (; length >= 8; length -= 8, at += 8) {
        uint64_t word = load64(at) ^ crc;
        crc = 0;
        for (int i = 0; i < 8; i++)
            crc ^= bytewise[7 - i][(word >> (8 * i)) & 0xff];
    }
    while (length--)
        crc = (crc >> 8) ^ bytewise[0][(crc ^ *at++) & 0xff];
    return ~crc;
}

#ifdef HARDWARE

static uint32_t shifted(uint32_t table[4][256], uint32_t crc) {
    return table[0][crc & 0xff] ^ table[1][(crc >> 8) & 0xff] ^ table[2][(crc >> 16) & 0xff] ^
           table[3][crc >> 24];
}

HARDWARE static uint32_t three_stretches(uint32_t crc, const unsigned char *at, size_t stretch,
                                         uint32_t table[4][256]) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < stretch; i += 8) {
        crc = STEP64(crc, load64(at + i));
        second = STEP64(second, load64(at + stretch + i));
        third = STEP64(third, load64(at + 2 * stretch + i));
    }
    return shifted(table, shifted(table, crc) ^ second) ^ third;
}

HARDWARE static uint32_t hardware(uint32_t crc, const void *data, size_t length) {
    const unsigned char *at = data;
    crc = ~crc;
    for (; length >= 3 * LONG_STRETCH; length -= 3 * LONG_STRETCH, at += 3 * LONG_STRETCH)
        crc = three_stretches(crc, at, LONG_STRETCH, shift_long);
    for (; length >= 3 * SHORT_STRETCH; length -= 3 * SHORT_STRETCH, at += 3 * SHORT_STRETCH)
        crc = three_stretches(crc, at, SHORT_STRETCH, shift_short);
    for (; length >= 8; length -= 8, at += 8)
        crc = STEP64(crc, load64(at));
    while (length--)
        crc = STEP8(crc, *at++);
    return ~crc;
}

static int has_hardware(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
}

#else

static uint32_t hardware(uint32_t crc, const void *data, size_t length) {
    return crc32c_portable(crc, data, length);
}

static int has_hardware(void) {
    return 0;
}

#endif

uint32_t crc32c(uint32_t crc, const void *data, size_t length) {
    return use_hardware ? hardware(crc, data, length) : crc32c_portable(crc, data, length);
}

const char *crc32c_backend(void) {
    if (!use_hardware)
        return "portable";
#if defined(__x86_64__)
    return "sse4.2";
#else
    return "armv8";
#endif
}

static void fill_shift(uint32_t table[4][256], uint64_t bytes) {
    uint32_t factor = shift_by(bytes);
    for (int lane = 0; lane < 4; lane++)
        for (uint32_t value = 0; value < 256; value++)
            table[lane][value] = multiply(factor, value << (8 * lane));
}

void crc32c_start(void) {
    for (uint32_t value = 0; value < 256; value++) {
        uint32_t crc = value;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? (crc >> 1) ^ POLYNOMIAL : crc >> 1;
        bytewise[0][value] = crc;
    }
    for (int lane = 1; lane < 8; lane++)
        for (int value = 0; value < 256; value++) {
            uint32_t before = bytewise[lane - 1][value];
            bytewise[lane][value] = (before >> 8) ^ bytewise[0][before & 0xff];
        }
    powers[0] = 1u << 30; /* x */
    for (int k = 1; k < 64; k++)
        powers[k] = multiply(powers[k - 1], powers[k - 1]);
    fill_shift(shift_long, LONG_STRETCH);
    fill_shift(shift_short, SHORT_STRETCH);
    use_hardware = has_hardware();
}
