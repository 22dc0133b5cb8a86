--- JSON as the admin API needs it.
--
-- Why: the cjson of OpenResty can tell an empty list from an empty object, Debian's cannot. So
-- lists are marked with `array`, and what we send is put together here; reading is cjson's.

local cjson = require "cjson.safe"

local concat = table.concat
local format = string.format
local getmetatable = getmetatable
local gsub = string.gsub
local pairs = pairs
local setmetatable = setmetatable
local sort = table.sort
local tostring = tostring
local type = type

local reader = cjson.new()
reader.decode_invalid_numbers(false)

local array_mt = {}

local _M = { null = cjson.null }


--- JSON of a string. cjson writes a slash as `\/`, which is right and hard to read.
local function quote(text)
    return (gsub(cjson.encode(text), "\\/", "/"))
end


_M.quote = quote


--- Marks `list` (a new one if nil) as a list, so that it is written as one even when empty.
function _M.array(list)
    return setmetatable(list or {}, array_mt)
end


local function write(out, value)
    local kind = type(value)
    if kind == "string" then
        out[#out + 1] = quote(value)
    elseif kind == "number" then
        out[#out + 1] = value % 1 == 0 and format("%d", value) or format("%.14g", value)
    elseif kind ~= "table" then
        out[#out + 1] = kind == "boolean" and tostring(value) or "null"
    elseif getmetatable(value) == array_mt then
        out[#out + 1] = "["
        for i = 1, #value do
            if i > 1 then
                out[#out + 1] = ","
            end
            write(out, value[i])
        end
        out[#out + 1] = "]"
    else
        local keys = {}
        for key in pairs(value) do
            keys[#keys + 1] = key
        end
        sort(keys)
        out[#out + 1] = "{"
        for i = 1, #keys do
            out[#out + 1] = (i > 1 and "," or "") .. quote(keys[i]) .. ":"
            write(out, value[keys[i]])
        end
        out[#out + 1] = "}"
    end
end


--- Text of `value`: keys sorted, tables without the mark are objects.
function _M.encode(value)
    local out = {}
    write(out, value)
    return concat(out)
end


--- Value of JSON `text`, or nil and what is wrong with it.
function _M.decode(text)
    return reader.decode(text)
end


return _M
