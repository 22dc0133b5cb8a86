--- An upstream as one immutable binary value, as it lies in the shared dict.
--
-- Why: a worker that meets a new version must not parse anything: records are of fixed width and
-- read in place through the FFI, so a version costs the same with 10 peers and with 10,000.
-- Peers are grouped (up, draining, probing, idle) by the one worker that writes; within a group
-- they are sorted by id, so equal content gives equal bytes. Nothing here touches a dict.

local ffi = require "ffi"
local posix = require "tidegate.posix"

local cast = ffi.cast
local copy = ffi.copy
local ffi_new = ffi.new
local ffi_string = ffi.string
local ipairs = ipairs
local sort = table.sort
local sub = string.sub

ffi.cdef [[
typedef struct {
    uint32_t magic;
    uint32_t count;        /* all peers */
    uint32_t up;           /* up, admitted, of weight > 0: the first in the list */
    uint32_t draining;     /* the next */
    uint32_t probing;      /* the next; what follows is idle: weight 0, or an address twice */
    uint32_t total_weight; /* of the up ones */
    double hold;           /* seconds */
    uint16_t uniform;      /* 1: the up ones have all the same weight */
    uint16_t version;      /* length of the writer's name for this content */
    uint32_t policy;       /* length of the policy's JSON text; both follow the peers */
} tidegate_head_t;

typedef struct {
    double since;          /* Unix time at which it came into its present state */
    uint32_t cumulative;   /* up ones: sum of the weights up to and with this one */
    uint32_t id_offset;    /* into the text that follows the peers */
    uint16_t port;
    uint16_t weight;
    uint16_t id_length;
    uint8_t state;
    uint8_t family;        /* 4 or 6 */
    uint8_t backup;        /* 1: only while no other one can */
    uint8_t address[16];
} tidegate_peer_t;
]]

local MAGIC = 0x54473032
local HEAD_SIZE = ffi.sizeof("tidegate_head_t")
local PEER_SIZE = ffi.sizeof("tidegate_peer_t")
local ADDRESS_OFFSET = ffi.offsetof("tidegate_peer_t", "address")
local head_type = ffi.typeof("tidegate_head_t")
local peer_ptr = ffi.typeof("const tidegate_peer_t *")
local head_out = ffi.typeof("tidegate_head_t *")
local peer_out = ffi.typeof("tidegate_peer_t *")
local char_ptr = ffi.typeof("const char *")
local buffer_type = ffi.typeof("char[?]")

local UP, DRAINING, PROBING = 1, 2, 3

local _M = {
    UP = UP,
    DRAINING = DRAINING,
    PROBING = PROBING,
    names = { [UP] = "up", [DRAINING] = "draining", [PROBING] = "probing" },
}


local function by_id(a, b)
    return a.id < b.id
end


local function sort_by_id(peers)
    for index = 2, #peers do
        if not by_id(peers[index - 1], peers[index]) then
            sort(peers, by_id)
            return
        end
    end
end


-- Moves the peers of one group from `rest` to `order`; gives those that are left. An address that
-- is already up is not taken a second time: a task that is being replaced under the same address
-- must not look draining.
local function take(rest, state, ups, order)
    local seen, left = {}, {}
    for _, peer in ipairs(rest) do
        local address
        if peer.state == state and peer.weight > 0 then
            address = peer.bytes .. ":" .. peer.port
        end
        if address and not seen[address] and not ups[address] then
            seen[address] = true
            order[#order + 1] = peer
        else
            left[#left + 1] = peer
        end
    end
    return left, seen
end


--- Packs an upstream.
-- @param upstream `{policy (JSON text), version (text), hold, peers}`; each peer
--   `{id, family, bytes, port, weight, state, since, backup}`; `peers` gets sorted
-- @return the value, and the number of peers that are being probed
function _M.encode(upstream)
    local peers, order = upstream.peers, {}
    sort_by_id(peers)
    local rest, ups = take(peers, UP, {}, order)
    local up = #order
    rest = take(rest, DRAINING, ups, order)
    local draining = #order - up
    rest = take(rest, PROBING, ups, order)
    local probing = #order - up - draining
    for _, peer in ipairs(rest) do
        order[#order + 1] = peer
    end
    local version = upstream.version or ""
    local text = #upstream.policy + #version
    for _, peer in ipairs(peers) do
        text = text + #peer.id
    end

    local size = HEAD_SIZE + #order * PEER_SIZE + text
    local buffer = ffi_new(buffer_type, size)
    local head = cast(head_out, buffer)
    local records = cast(peer_out, buffer + HEAD_SIZE)
    local strings = buffer + HEAD_SIZE + #order * PEER_SIZE
    copy(strings, upstream.policy, #upstream.policy)
    copy(strings + #upstream.policy, version, #version)
    local offset, total, uniform = #upstream.policy + #version, 0, 1
    for index, peer in ipairs(order) do
        local record = records[index - 1]
        if index <= up then
            total = total + peer.weight
            record.cumulative = total
            if peer.weight ~= order[1].weight then
                uniform = 0
            end
        end
        record.since = peer.since
        record.id_offset = offset
        record.id_length = #peer.id
        record.port = peer.port
        record.weight = peer.weight
        record.state = peer.state
        record.family = peer.family
        record.backup = peer.backup and 1 or 0
        copy(record.address, peer.bytes, #peer.bytes)
        copy(strings + offset, peer.id, #peer.id)
        offset = offset + #peer.id
    end
    head.magic = MAGIC
    head.count = #order
    head.up = up
    head.draining = draining
    head.probing = probing
    head.total_weight = total
    head.hold = upstream.hold
    head.uniform = uniform
    head.policy = #upstream.policy
    head.version = #version
    return ffi_string(buffer, size), probing
end


--- The head of packed `blob`, a copy; nil where it is not one.
function _M.head(blob)
    if #blob < HEAD_SIZE then
        return nil
    end
    local head = head_type()
    copy(head, blob, HEAD_SIZE)
    local text = head.policy + head.version
    if head.magic ~= MAGIC or #blob < HEAD_SIZE + head.count * PEER_SIZE + text then
        return nil
    end
    return head
end


--- The peers of packed `blob`, in place, index from 0. The caller keeps `blob` referenced as long
-- as it uses them: a pointer does not keep a string from being collected.
function _M.peers(blob)
    return cast(peer_ptr, cast(char_ptr, blob) + HEAD_SIZE)
end


--- JSON text of the policy of packed `blob` with `head`.
function _M.policy(blob, head)
    local at = HEAD_SIZE + head.count * PEER_SIZE
    return sub(blob, at + 1, at + head.policy)
end


--- What the writer called the content of packed `blob` with `head`; empty if nothing.
function _M.version(blob, head)
    local at = HEAD_SIZE + head.count * PEER_SIZE + head.policy
    return sub(blob, at + 1, at + head.version)
end


--- Unpacks `blob` into what `encode` takes.
function _M.decode(blob)
    local head = _M.head(blob)
    local records, peers = _M.peers(blob), {}
    local strings = HEAD_SIZE + head.count * PEER_SIZE
    for index = 0, head.count - 1 do
        local record = records[index]
        local address = HEAD_SIZE + index * PEER_SIZE + ADDRESS_OFFSET
        local id = strings + record.id_offset
        peers[index + 1] = {
            family = record.family,
            port = record.port,
            weight = record.weight,
            state = record.state,
            since = record.since,
            backup = record.backup == 1,
            bytes = sub(blob, address + 1, address + (record.family == 6 and 16 or 4)),
            id = sub(blob, id + 1, id + record.id_length),
        }
    end
    -- Reading the policy last keeps the blob, which the records point into, alive until here.
    return {
        peers = peers,
        hold = head.hold,
        version = _M.version(blob, head),
        policy = _M.policy(blob, head),
    }
end


--- How a peer is to be named to nginx: an IPv6 address goes in brackets.
-- @param bytes string or pointer
function _M.host(family, bytes)
    local text = posix.format_address(family, bytes)
    return family == 6 and "[" .. text .. "]" or text
end


return _M
