/* The loops of codes.py for float32 on a CPU, bit for bit what its tensor operations give.
 *
 * Compiled at run time without contraction (a * b + c stays two roundings), see kernels.py. That nothing traps lets the
 * compiler take both sides of a choice at once: fp8 is ten times as fast with it.
 */
#include <stdint.h>
#include <string.h>

static inline int32_t bits_of(float value) { int32_t bits; memcpy(&bits, &value, 4); return bits; }
static inline float float_of(int32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

/* The largest magnitude of a block; as integers NaN is above all numbers. */
static inline float largest(const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return float_of(most);
}

void decode_bytes(const uint8_t *restrict codes, const float *restrict scales, const float *restrict table,
                  float *restrict out, int64_t n) {
    for (int64_t start = 0; start < n; start += 256) {
        int64_t end = start + 256 < n ? start + 256 : n;
        float scale = scales[start / 256];
        for (int64_t i = start; i < end; i++) out[i] = table[codes[i]] * scale;
    }
}

void encode_bytes(const float *restrict x, uint8_t *restrict codes, float *restrict scales,
                  const int32_t *restrict noise, int64_t n, float tiny, float offset, float range, int32_t lowest,
                  int32_t is_signed) {
    for (int64_t start = 0; start < n; start += 256) {
        int64_t count = start + 256 < n ? 256 : n - start;
        const float *block = x + start;
        float scale = largest(block, count);
        if (scale < tiny) scale = tiny;
        scales[start / 256] = scale;
        if (is_signed) {
            for (int64_t i = 0; i < count; i++) {
                float ratio = float_of(bits_of(block[i]) & 0x7fffffff) / scale * range + offset;
                int32_t code = ((bits_of(ratio) + noise[i]) >> 20) - lowest;
                int32_t negative = bits_of(block[i]) >> 31;
                codes[start + i] = (uint8_t)((code ^ negative) - negative);
            }
        } else {
            for (int64_t i = 0; i < count; i++) {
                float ratio = block[i] / scale * range + offset;
                int32_t code = ((bits_of(ratio) + noise[i]) >> 20) - lowest;
                int32_t floor = block[i] > 0.0f;
                codes[start + i] = (uint8_t)(code > floor ? code : floor);
            }
        }
    }
}

void encode_fp8(const float *restrict x, uint8_t *restrict codes, float *restrict scales,
                const int32_t *restrict noise, int64_t n, float tiny, int32_t is_signed) {
    for (int64_t start = 0; start < n; start += 256) {
        int64_t count = start + 256 < n ? 256 : n - start;
        const float *block = x + start;
        float scale = largest(block, count);
        if (scale < tiny) scale = tiny;
        scales[start / 256] = scale;
        for (int64_t i = 0; i < count; i++) {
            float value = float_of(bits_of(block[i]) & 0x7fffffff) / scale * 448.0f;
            float high = value > 0.015625f ? value : 0.015625f, low = value < 0.015625f ? value : 0.015625f;
            int32_t code = ((bits_of(high) + noise[i]) >> 20) - 968;
            code += (int32_t)(low * 512.0f + (float)noise[i] * 0x1p-20f);
            int32_t floor = !is_signed & (value > 0.0f);
            code = code > floor ? code : floor;
            codes[start + i] = (uint8_t)(code | ((bits_of(block[i]) >> 31) & -(code > 0) & 0x80));
        }
    }
}

void decode_nibbles(const uint8_t *restrict codes, const float *restrict scales, const float *restrict table,
                    float *restrict out, int64_t n) {
    for (int64_t start = 0; start < n; start += 128) {
        const uint8_t *bytes = codes + start / 2;
        float scale = scales[start / 128];
        int64_t count = n - start;
        if (count >= 128) {
            for (int64_t i = 0; i < 64; i++) out[start + i] = table[bytes[i] & 15] * scale;
            for (int64_t i = 0; i < 64; i++) out[start + 64 + i] = table[bytes[i] >> 4] * scale;
        } else {
            for (int64_t i = 0; i < count; i++)
                out[start + i] = table[i < 64 ? bytes[i] & 15 : bytes[i - 64] >> 4] * scale;
        }
    }
}

/* `lines`: slope and height of the six lines of which the signed map is made, see codes.py. */
void encode_nibbles(const float *restrict x, uint8_t *restrict codes, float *restrict scales,
                    const int32_t *restrict noise, int64_t n, float tiny, const float *restrict lines,
                    int32_t is_signed) {
    float padded[128];
    int32_t code[128];
    for (int64_t start = 0; start < n; start += 128) {
        int64_t count = start + 128 < n ? 128 : n - start;
        memset(padded, 0, sizeof padded);
        memcpy(padded, x + start, count * sizeof(float));
        float scale = largest(padded, 128);
        if (scale < tiny) scale = tiny;
        if (is_signed) {
            float most = 0.0f, least = 0.0f; /* the largest magnitude is always +1 times the scale */
            for (int i = 0; i < 128; i++) {
                most = padded[i] > most ? padded[i] : most;
                least = padded[i] < least ? padded[i] : least;
            }
            if (-least > most) scale = -scale;
            for (int i = 0; i < 128; i++) {
                float ratio = padded[i] / scale, size = float_of(bits_of(ratio) & 0x7fffffff);
                float place = size * lines[0] + lines[1];
                for (int line = 1; line < 5; line++) {
                    float other = size * lines[2 * line] + lines[2 * line + 1];
                    place = other < place ? other : place;
                }
                float last = size * lines[10] + lines[11];
                place = last > place ? last : place;
                int32_t index = (int32_t)(place + (float)noise[i] * 0x1p-20f);
                int32_t negative = ratio < 0.0f, limit = 8 - negative;
                index = index < limit ? index : limit;
                code[i] = negative ? 7 - index : 7 + index;
            }
        } else {
            for (int i = 0; i < 128; i++) {
                float place = padded[i] / scale * 16.0f - 1.0f + (float)noise[i] * 0x1p-20f;
                int32_t index = (int32_t)(place > 0.0f ? place : 0.0f);
                code[i] = index < 15 ? index : 15;
            }
        }
        scales[start / 128] = scale;
        for (int i = 0; i < 64; i++) codes[start / 2 + i] = (uint8_t)((code[i] & 15) | (code[64 + i] & 15) << 4);
    }
}

/* Rounded by `noise`, of 0 ... 65535 a position, to bfloat16. */
void encode_bfloat16(const float *restrict x, uint16_t *restrict codes, const int32_t *restrict noise, int64_t n) {
    for (int64_t start = 0; start < n; start += 256) {
        int64_t end = start + 256 < n ? start + 256 : n;
        for (int64_t i = start; i < end; i++) codes[i] = (uint16_t)((bits_of(x[i]) + (noise[i - start] >> 4)) >> 16);
    }
}

void decode_bfloat16(const uint16_t *restrict codes, float *restrict out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = float_of((int32_t)((uint32_t)codes[i] << 16));
}
