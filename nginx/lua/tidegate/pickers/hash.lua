--- The same peer for the same key: consistent hashing, with a bound to each peer's load.
--
-- Peers have points on a ring, by their ids alone. A key is hashed to some twenty places, and the
-- one that has the shortest way to the next point decides: few points per peer, so a version of
-- thousands is made in milliseconds, and yet even shares. A peer that comes takes keys from the
-- others and moves none between them; one that goes leaves its keys to the others. Every worker of
-- every instance has the same ring. Where a request has no key it is round robin.
--
-- Weights are numbers of points, up to what a peer of average weight has 16 of; the rest of the
-- precision comes from points that are not taken for every key.

local ffi = require "ffi"
local bit = require "bit"
local codec = require "tidegate.codec"
local load = require "tidegate.load"
local round_robin = require "tidegate.pickers.round_robin"

local bxor, lshift, rshift, tobit = bit.bxor, bit.lshift, bit.rshift, bit.tobit
local byte = string.byte
local ceil = math.ceil
local crc32 = ngx.crc32_long
local ffi_new = ffi.new
local floor = math.floor
local gsub = string.gsub
local log = math.log
local lower = string.lower
local match = string.match
local max = math.max
local md5 = ngx.md5_bin
local min = math.min
local setmetatable = setmetatable
local sum = load.sum
local var = ngx.var

local POINTS = 16
local PROBES = 21
local ROUNDS = 64
local TRIES = 16
local STEP = 0x9e3779b9     -- the golden ratio, of 2^32
local RANGE = 2 ^ 32

local words = ffi.typeof("uint32_t[?]")

local _M = {}
local class = {}
class.__index = class


-- Bob Jenkins' mixing of 32 bits.
local function mix(value)
    value = tobit(tobit(value + 0x7ed55d16) + lshift(value, 12))
    value = bxor(bxor(value, 0xc761c23c), rshift(value, 19))
    value = tobit(tobit(value + 0x165667b1) + lshift(value, 5))
    value = bxor(tobit(value + 0xd3a2646c), lshift(value, 9))
    value = tobit(tobit(value + 0xfd7046c5) + lshift(value, 3))
    return bxor(bxor(value, 0xb55a4f09), rshift(value, 16))
end


-- Two numbers of 32 bits for an id.
local function numbers_of(id)
    local a, b, c, d, e, f, g, h = byte(md5(id), 1, 8)
    return tobit(a + b * 256 + c * 65536 + d * 16777216),
           tobit(e + f * 256 + g * 65536 + h * 16777216)
end


-- The power of two that `POINTS` points stand for: not below the mean weight, so that there are no
-- more points than that per peer; the same for as long as the mean stays about the same.
local function scale_of(view)
    return 2 ^ ceil(log(view.total_weight / view.count) / log(2) - 1e-9)
end


-- Makes the ring: points in order, their peers, and for each of equal parts of the ring the first
-- point that may be in it.
local function build(view)
    local scale = scale_of(view)
    local function points_of(weight)
        return max(1, ceil(POINTS * weight / scale))
    end

    local total = 0
    for place = 0, view.count - 1 do
        total = total + points_of(view.peers[view.first + place].weight)
    end
    local bits = max(1, ceil(log(total) / log(2)))
    local shift, parts = 32 - bits, 2 ^ bits
    local at, owner = ffi_new(words, total), ffi_new(words, total)
    local start = ffi_new(words, parts + 1)
    -- Counted first, then put in place part by part: no sorting of tens of thousands.
    local raw, raw_owner, place_of = ffi_new(words, total), ffi_new(words, total), 0
    for place = 0, view.count - 1 do
        local index = view.first + place
        local a, b = numbers_of(codec.id(view.blob, view.head.count, index))
        for number = 1, points_of(view.peers[index].weight) do
            local point = bxor(mix(tobit(a + number * STEP)), b) % RANGE
            raw[place_of], raw_owner[place_of] = point, index
            place_of = place_of + 1
            local part = floor(point / 2 ^ shift) + 1
            start[part] = start[part] + 1
        end
    end
    for part = 1, parts do
        start[part] = start[part] + start[part - 1]
    end
    local filled = ffi_new(words, parts)
    for number = 0, total - 1 do
        local point, who = raw[number], raw_owner[number]
        local part = floor(point / 2 ^ shift)
        local place = start[part] + filled[part]
        filled[part] = filled[part] + 1
        while place > start[part] and (at[place - 1] > point
                or at[place - 1] == point and owner[place - 1] > who) do
            at[place], owner[place] = at[place - 1], owner[place - 1]
            place = place - 1
        end
        at[place], owner[place] = point, who
    end
    return {
        at = at, owner = owner, start = start, width = 2 ^ shift, total = total, scale = scale,
    }
end


-- The peer for a key's hash, for the attempt of that number: the next attempts name others.
local function pick(self, hash, attempt)
    local ring, peers = self.ring, self.view.peers
    local at, start, width, total = ring.at, ring.start, ring.width, ring.total
    local seed = mix(tobit(hash + attempt * 0x61c88647))
    local index
    for round = 1, ROUNDS do
        local shortest, nearest = RANGE, 0
        local place = seed
        for _ = 1, PROBES do
            place = tobit(place + STEP)
            local point = mix(place) % RANGE
            local number = start[floor(point / width)]
            while number < total and at[number] < point do
                number = number + 1
            end
            if number == total then
                number = 0
            end
            local way = (at[number] - point) % RANGE
            if way < shortest then
                shortest, nearest = way, number
            end
        end
        index = ring.owner[nearest]
        local weight = peers[index].weight
        local wanted = POINTS * weight / ring.scale
        local points = max(1, ceil(wanted))
        if points == wanted then
            return index
        end
        seed = mix(bxor(seed, round))
        -- What this peer's number of points is above its weight, it leaves to others.
        if mix(bxor(seed, at[nearest])) % RANGE < wanted / points * RANGE then
            return index
        end
    end
    return index
end


local function key_hash(self)
    local key = self.key()
    return key and key ~= "" and tobit(crc32(key)) or nil
end


-- Whether one more request leaves a peer within the bound.
local function has_room(self, index)
    local view = self.view
    local peer = view.peers[index]
    local share = (sum(view.cell) + 1) * peer.weight / view.total_weight
    return sum(peer.cell) + 1 <= ceil(self.balance * share)
end


function class:search(ok, context)
    local hash = key_hash(self)
    if not hash then
        return self.other:search(ok, context)
    end
    local view = self.view
    if not self.ring then
        self.ring = build(view)
    end
    local bounded = self.balance > 0
    local fallback
    for attempt = 0, min(view.count * 4, TRIES) - 1 do
        local index = pick(self, hash, attempt)
        if not ok or ok(context, index) then
            if not bounded or has_room(self, index) then
                return index
            end
            fallback = fallback or index
        end
    end
    local start = hash % view.count
    for step = 0, view.count - 1 do
        local index = view.first + (start + step) % view.count
        if not ok or ok(context, index) then
            if not bounded or has_room(self, index) then
                return index
            end
            fallback = fallback or index
        end
    end
    return fallback
end


function class:next()
    if self.balance > 0 then
        return self:search()
    end
    local hash = key_hash(self)
    if not hash then
        return self.other:next()
    end
    if not self.ring then
        self.ring = build(self.view)
    end
    return pick(self, hash, 0)
end


-- The request's path, as it was sent.
local function path_of()
    return match(var.request_uri or "", "^[^?]*")
end


--- A function that gives the key of the current request, nil or empty where it has none.
-- @param spec `ip`, `uri`, `header:NAME`, `cookie:NAME` or `arg:NAME`
function _M.key(spec)
    if spec == "uri" then
        return path_of
    end
    local kind, name = match(spec, "^(%a+):(.+)$")
    local variable
    if kind == "header" then
        variable = "http_" .. lower(gsub(name, "-", "_"))
    elseif kind == "cookie" or kind == "arg" then
        variable = kind .. "_" .. name
    elseif spec == "ip" then
        variable = "remote_addr"
    end
    return function()
        return variable and var[variable]
    end
end


--- Picker for `view`; see `tidegate.pickers`. Of `view.key`, where given, instead of the policy's.
function _M.new(view, previous)
    return setmetatable({
        view = view,
        key = _M.key(view.key or view.policy.hash_key),
        balance = view.key and 0 or view.policy.hash_balance > 0
            and max(1, view.policy.hash_balance) or 0,
        other = round_robin.new(view, previous and previous.other),
    }, class)
end


return _M
