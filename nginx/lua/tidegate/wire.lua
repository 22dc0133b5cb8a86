--- Checks what comes over the wire, and turns upstreams from JSON values into the store's form.
--
-- Why: a push is refused whole, with a reason for each fault, before anything is touched; what
-- passes here can be stored without further questions.

local codec = require "tidegate.codec"
local json = require "tidegate.json"
local live = require "tidegate.live"
local pickers = require "tidegate.pickers"
local policies = require "tidegate.policy"
local posix = require "tidegate.posix"

local byte = string.byte
local concat = table.concat
local find = string.find
local floor = math.floor
local ipairs = ipairs
local pairs = pairs
local sort = table.sort
local tostring = tostring
local type = type

local MAX_ERRORS = 100
local MAX_PEERS = 10000
local MAX_WEIGHT = 1000
local MAX_HOLD = 300
local MAX_INTEGER = 2 ^ 53
local STATES = { up = codec.UP, draining = codec.DRAINING }
local UNSPECIFIED = {
    [("\0"):rep(4)] = true,
    [("\0"):rep(16)] = true,
    [("\0"):rep(10) .. "\255\255" .. ("\0"):rep(4)] = true,
}

local _M = {}


--- Whether `value` is a whole number from `low` to `high`.
local function whole(value, low, high)
    return type(value) == "number" and value >= low and value <= high and floor(value) == value
end


--- Whether `value` can be a revision.
function _M.is_revision(value)
    return whole(value, 0, MAX_INTEGER)
end


--- Whether `value` is 1 to 128 printable ASCII characters.
local function is_token(value)
    if type(value) ~= "string" or #value == 0 or #value > 128 then
        return false
    end
    for index = 1, #value do
        local code = byte(value, index)
        if code < 32 or code > 126 then
            return false
        end
    end
    return true
end


_M.is_writer = is_token


--- Whether `value` can be the name of an upstream.
function _M.is_name(value)
    return type(value) == "string" and #value >= 1 and #value <= 512
        and not find(value, "[%z\1-\31\127]")
end


local function is_object(value)
    return type(value) == "table"
end


-- Length of a list; nil where `value` is none.
local function length(value)
    if type(value) ~= "table" then
        return nil
    end
    local count = 0
    for key in pairs(value) do
        if type(key) ~= "number" then
            return nil
        end
        count = count + 1
    end
    return count
end


local function fault(errors, upstream, field, message)
    if #errors < MAX_ERRORS then
        errors[#errors + 1] = { upstream = upstream, field = field, message = message }
    end
end


local function shown(value)
    if type(value) == "string" then
        return json.encode(#value > 80 and value:sub(1, 80) .. "…" or value)
    end
    return type(value) == "table" and "an object" or value == json.null and "null"
        or tostring(value)
end


local function read_peer(errors, name, index, item, ids)
    if not is_object(item) then
        fault(errors, name, "peers[" .. index .. "]", "is " .. shown(item)
              .. "; expected an object")
        return nil
    end
    local before = #errors
    local function wrong(field, message)
        fault(errors, name, "peers[" .. index .. "]." .. field,
              "is " .. shown(item[field]) .. message)
    end
    if not is_token(item.id) then
        wrong("id", "; expected 1 to 128 printable ASCII characters")
    elseif ids[item.id] then
        wrong("id", ", as another peer's")
    else
        ids[item.id] = true
    end
    local family, bytes
    if type(item.address) == "string" then
        family, bytes = posix.parse_address(item.address)
    end
    if not family then
        wrong("address", "; expected an IPv4 or IPv6 address")
    elseif UNSPECIFIED[bytes] then
        wrong("address", ", which is nobody's address")
    end
    if not whole(item.port, 1, 65535) then
        wrong("port", "; expected 1 to 65535")
    end
    local weight = item.weight == nil and 1 or item.weight
    if not whole(weight, 0, MAX_WEIGHT) then
        wrong("weight", "; expected 0 to 1000")
    end
    local state = STATES[item.state == nil and "up" or item.state]
    if not state then
        wrong("state", "; expected up or draining")
    end
    if item.backup ~= nil and type(item.backup) ~= "boolean" then
        wrong("backup", "; expected true or false")
    end
    if #errors > before then
        return nil
    end
    return {
        id = item.id,
        family = family,
        bytes = bytes,
        port = item.port,
        weight = weight,
        state = state,
        backup = item.backup == true,
    }
end


--- Reads one upstream.
-- @param errors list that faults are added to
-- @param unsupported set of algorithms and fields of policies that this instance lacks, added to
-- @return the upstream as `codec.encode` takes it, without the peers' `since`; nil if faulty
function _M.read_upstream(name, item, errors, unsupported)
    if not _M.is_name(name) then
        fault(errors, name, "name", "expected 1 to 512 bytes without control characters")
        return nil
    end
    if not is_object(item) then
        fault(errors, name, "", "is " .. shown(item) .. "; expected an object")
        return nil
    end
    local before = #errors
    local policy = policies.read(item.policy, function(path, value, expected)
        fault(errors, name, path, "is " .. shown(value) .. "; expected " .. expected)
    end, unsupported)
    if #errors == before then
        local algorithm = policies.parse(policy).algorithm
        if not pickers.has(algorithm) then
            unsupported[algorithm] = true
        end
    end
    local hold = item.hold == nil and 0 or item.hold
    if type(hold) ~= "number" or not (hold >= 0 and hold <= MAX_HOLD) then
        fault(errors, name, "hold", "is " .. shown(hold) .. "; expected 0 to 300 seconds")
    end
    local version = item.version == nil and "" or item.version
    if version ~= "" and not is_token(version) then
        fault(errors, name, "version", "is " .. shown(version)
              .. "; expected at most 128 printable ASCII characters")
    end
    local count = length(item.peers)
    if not count then
        fault(errors, name, "peers", "is " .. shown(item.peers) .. "; expected a list")
        return nil
    elseif count > MAX_PEERS then
        fault(errors, name, "peers", "has " .. count .. " peers; at most 10000 are possible")
        return nil
    end
    local peers, ids = {}, {}
    for index = 1, count do
        peers[index] = read_peer(errors, name, index - 1, item.peers[index], ids)
        if #errors >= MAX_ERRORS then
            break
        end
    end
    if #errors > before then
        return nil
    end
    return { policy = policy, version = version, hold = hold, peers = peers }
end


--- Reads a list of upstream names.
-- @return list, or nil and what is wrong
function _M.read_names(value)
    local count = length(value)
    if not count then
        return nil, "is " .. shown(value) .. "; expected a list of names"
    end
    for index = 1, count do
        if not _M.is_name(value[index]) then
            return nil, "has an element that is not a name of an upstream"
        end
    end
    return value
end


--- An upstream and the state of its peers as the API shows it, as JSON text.
-- There may be 100,000 peers to show, so this is put together by hand.
function _M.show_upstream(name, upstream)
    local policy = policies.parse(upstream.policy)
    sort(upstream.peers, function(a, b) return a.id < b.id end)
    local parts = {}
    for index, peer in ipairs(upstream.peers) do
        parts[index] = '{"id":' .. json.quote(peer.id)
            .. ',"address":"' .. posix.format_address(peer.family, peer.bytes)
            .. '","port":' .. peer.port .. ',"weight":' .. peer.weight
            .. ',"state":"' .. (peer.state == codec.DRAINING and "draining" or "up")
            .. (peer.backup and '","backup":true' or '"')
            .. ',"live":' .. live.peer_json(name, policy, peer) .. "}"
    end
    local now = live.upstream(name, policy)
    return '{"policy":' .. upstream.policy .. ',"hold":' .. json.encode(upstream.hold)
        .. (now and ',"live":' .. json.encode(now) or "")
        .. ',"peers":[' .. concat(parts, ",") .. "]}"
end


return _M
